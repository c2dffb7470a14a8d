"""GPTQ: weights of a linear layer rounded column by column, each rounding error spread over the columns still to come.

With H = 2 X X^T of the inputs X of the layer, a row w of its weights becomes codes q that keep (w - q) H (w - q)^T
small. The columns are rounded in one order for all rows, so that one upper Cholesky factor U of the inverse of the
damped H serves the whole sweep: after column i, w[i:] -= (w_i - q_i) / U_ii * U[i, i:]. Updates beyond a block of
columns are applied once per block as a matrix product; the codes do not depend on the block.

Source: arXiv 2210.17323, algorithm 1 and section 3.3; the released code for grids, groups and activation order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bitwright.arithmetic.late_dequantisation import GroupedWeights
from bitwright.core.errors import BitwrightError, InputError

_RAISES = 4  # times the damping may be raised tenfold before the Hessian is given up
_SHRINKS = tuple(1 - step / 100 for step in range(80))  # ranges tried by the error search, 100 % to 21 %
_ERROR_POWER = 2.4


class Hessian:
    """H = 2 X X^T as a running mean over samples: add inputs (..., columns) as they come, float32."""

    def __init__(self, columns: int) -> None:
        self.matrix = torch.zeros(columns, columns)
        self.samples = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take the inputs of one call of the layer: (batch, ..., columns); a batch of one where there is one axis.

        Raises InputError for another width, and for NaN and infinity.
        """
        columns = len(self.matrix)
        if inputs.shape[-1] != columns:
            raise InputError(f"Inputs {tuple(inputs.shape)} of a layer with {columns} columns.")
        rows = inputs.detach().reshape(-1, columns).float()
        if not torch.isfinite(rows).all():
            raise InputError("The layer's inputs hold NaN or infinity; calibrate with a model that computes numbers.")
        batch = inputs.shape[0] if inputs.ndim > 1 else 1
        kept = self.samples / (self.samples + batch)
        self.samples += batch
        self.matrix.addmm_(rows.T, rows, beta=kept, alpha=2 / self.samples)


@dataclass(frozen=True)
class QuantisedWeight:
    """Codes uint8 (rows, columns) in the layer's own order of columns; `scale` and `zero` float32 (rows, groups), value
    = scale * (code - zero); `group_of` int64 (columns,) says whose scale a column has. `loss` is the sum of
    (w - q)^2 / (2 U_ii^2); `damping` the share of the mean diagonal that was added; `dead` the inputs never seen."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_of: torch.Tensor
    bits: int
    loss: float
    damping: float
    dead: int

    def dequantise(self) -> torch.Tensor:
        """The values, float32 (rows, columns)."""
        zero, scale = self.zero[:, self.group_of], self.scale[:, self.group_of]
        return scale * (self.codes.to(torch.float32) - zero)

    def grouped(self) -> GroupedWeights:
        """As packed kernels take them. Raises InputError where columns of a group do not lie together (activation order
        without static groups)."""
        columns, groups = len(self.group_of), self.scale.shape[1]
        size = -(-columns // groups)
        if not torch.equal(self.group_of, torch.arange(columns) // size):
            raise InputError("Groups are scattered over the columns; quantise with static_groups for packed kernels.")
        return GroupedWeights(
            np.ascontiguousarray(self.codes.T.numpy()), np.ascontiguousarray(self.scale.T.numpy()),
            np.ascontiguousarray(self.zero.T.to(torch.uint8).numpy()), self.bits, size,
        )  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """Codes 0 .. most of value scale * (code - zero); `scale` and `zero` (rows,)."""

    scale: torch.Tensor
    zero: torch.Tensor
    most: int

    def codes(self, column: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(column / self.scale) + self.zero, 0, self.most)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return self.scale * (codes - self.zero)


def _grid(weight: torch.Tensor, bits: int, symmetric: bool, search: bool) -> _Grid:
    """The grid of every row of (rows, columns): least to largest value, zero included, or what the search finds."""
    most = 2**bits - 1
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -torch.ones_like(low), low), torch.where(empty, torch.ones_like(high), high)

    def between(shrink: float) -> _Grid:
        scale = shrink * (high - low) / most
        zero = torch.full_like(scale, (most + 1) // 2) if symmetric else torch.round(-shrink * low / scale)
        return _Grid(scale, zero, most)

    best = between(1.0)
    if not search:
        return best
    errors = torch.full_like(low, torch.inf)
    scale, zero = best.scale.clone(), best.zero.clone()
    for shrink in _SHRINKS:
        tried = between(shrink)
        wide = _Grid(tried.scale[:, None], tried.zero[:, None], most)
        error = (wide.values(wide.codes(weight)) - weight).abs().pow(_ERROR_POWER).sum(1)
        better = error < errors
        errors = torch.where(better, error, errors)
        scale, zero = torch.where(better, tried.scale, scale), torch.where(better, tried.zero, zero)
    return _Grid(scale, zero, most)


def _factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the damped inverse, and the damping that made it possible."""
    mean = hessian.diagonal().mean()
    for _ in range(_RAISES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not wrong:
                return upper, damping
        damping = 10 * damping if damping else 0.01
    raise BitwrightError(f"The Hessian has no Cholesky factor, even with {damping / 10:g} of its mean on the diagonal.")


def quantise(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int = 4, group: int | None = None, symmetric: bool = False,
    act_order: bool = False, static_groups: bool = False, damping: float = 0.01, block: int = 128,
    search: bool = False,
) -> QuantisedWeight:  # fmt: skip
    """Codes of a layer's weights (rows, columns) for inputs with this Hessian (columns, columns).

    `group` columns share a scale and zero point (all of a row without); `act_order` rounds columns with large diagonals
    first; `static_groups` fixes the grids before the sweep, by the original columns, else a group's grid is that of the
    compensated weights when the sweep enters it; `search` shrinks ranges where that lowers the error. Computed in the
    type of `weight`, float32 or float64. Raises InputError for shapes, widths and groups that do not fit, and for NaN;
    BitwrightError for a Hessian that has no Cholesky factor after raising the damping.
    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1],) * 2 or not weight.numel():
        raise InputError(
            f"Weights {tuple(weight.shape)} and Hessian {tuple(hessian.shape)} do not fit: (r, c), (c, c)."
        )
    if not 2 <= bits <= 8 or block < 1 or damping < 0:
        raise InputError(f"{bits} bits, blocks of {block}, damping {damping}: expected 2 to 8, at least 1, at least 0.")
    columns = weight.shape[1]
    size = columns if group is None else group
    if size < 1 or columns % size:
        raise InputError(f"Groups of {size} do not divide {columns} columns; choose a divisor, or None for whole rows.")
    if not (torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise InputError("Weights or Hessian hold NaN or infinity.")
    w = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32).clone()
    h = hessian.to(w.dtype).clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    static = [_grid(w[:, at : at + size], bits, symmetric, search) for at in range(0, columns, size)] \
        if static_groups else []  # fmt: skip
    w, h = w[:, order], h[order][:, order]
    upper, used = _factor(h, damping)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    grids: list[_Grid] = []
    group_of = torch.empty(columns, dtype=torch.int64)
    loss = 0.0
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        errors = torch.empty(len(w), end - begin, dtype=w.dtype)
        for i in range(begin, end):
            if static:
                place = int(order[i]) // size
                grid = static[place]
            else:
                place = i // size
                if i % size == 0:
                    # columns of the group beyond this block lack the updates of the block so far
                    ahead = w[:, i : i + size].clone()
                    late = max(0, i + size - end)
                    if late and i > begin:
                        ahead[:, -late:] -= errors[:, : i - begin] @ upper[begin:i, end : i + size]
                    grids.append(_grid(ahead, bits, symmetric, search))
                grid = grids[place]
            column = w[:, i]
            chosen = grid.codes(column)
            difference = column - grid.values(chosen)
            error = difference / upper[i, i]
            loss += float((error * error).sum()) / 2
            w[:, i:end] -= error[:, None] * upper[i, i:end]
            errors[:, i - begin] = error
            codes[:, order[i]] = chosen.to(torch.uint8)
            group_of[order[i]] = place
        w[:, end:] -= errors @ upper[begin:end, end:]
    used_grids = static or grids
    return QuantisedWeight(
        codes, torch.stack([each.scale for each in used_grids], 1).float(),
        torch.stack([each.zero for each in used_grids], 1).float(), group_of, bits, loss, used, int(dead.sum()),
    )  # fmt: skip


def round_to_nearest(
    weight: torch.Tensor, bits: int = 4, group: int | None = None, symmetric: bool = False, search: bool = False
) -> QuantisedWeight:
    """The same grids without any compensation: what GPTQ is measured against. Raises as `quantise`."""
    identity = torch.eye(weight.shape[-1] if weight.ndim else 0, dtype=weight.dtype)
    return quantise(weight, identity, bits, group, symmetric, damping=0.0, search=search)
