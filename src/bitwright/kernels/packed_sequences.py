"""Sequences of different length packed into one matrix of their real tokens, and one-pass operators on its rows.

A padded batch (batch, longest, width) with lengths becomes rows (tokens, width); `offsets` says where each sequence
begins and `index` where each row lies in the padded batch. Source: arXiv 2210.03052, sections on packing and fusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.threads import thread_count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch lie: `offsets` int32 (batch + 1,), the first row of each sequence and the
    number of all; `index` int64 (tokens,), the place of each row in the flattened batch (batch * longest)."""

    offsets: torch.Tensor
    index: torch.Tensor
    batch: int
    longest: int

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return len(self.index)

    @property
    def share(self) -> float:
        """Real tokens over all places of the padded batch."""
        return self.tokens / max(self.batch * self.longest, 1)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, longest, ...) to rows (tokens, ...)."""
        if tuple(x.shape[:2]) != (self.batch, self.longest):
            raise InputError(f"A batch {tuple(x.shape)} does not fit the packing of {(self.batch, self.longest)}.")
        return x.reshape(self.batch * self.longest, *x.shape[2:]).index_select(0, self.index)

    def unpack(self, rows: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Rows (tokens, ...) to (batch, longest, ...); padding becomes `fill`."""
        if len(rows) != self.tokens:
            raise InputError(f"{len(rows)} rows do not fit the packing of {self.tokens} tokens.")
        out = rows.new_full((self.batch * self.longest, *rows.shape[1:]), fill)
        return out.index_copy_(0, self.index, rows).view(self.batch, self.longest, *rows.shape[1:])


def packing(mask: torch.Tensor) -> Packing:
    """The packing of a mask (batch, longest), true for real tokens: at the beginning of a row, or anywhere.

    Empty sequences are fine. Raises InputError for masks that are not bool or of another shape.
    """
    import torch

    if mask.dtype != torch.bool or mask.ndim != 2:
        raise InputError(f"A mask is bool (batch, tokens), not {mask.dtype} {tuple(mask.shape)}.")
    counts = mask.sum(1)
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int32)
    offsets[1:] = torch.cumsum(counts, 0)
    return Packing(offsets, mask.reshape(-1).nonzero().squeeze(1), len(mask), mask.shape[1])


def packing_of_lengths(lengths: torch.Tensor, longest: int | None = None) -> Packing:
    """The packing of sequences padded at their ends, of these lengths (batch,), to `longest` (default their largest).

    Raises InputError for lengths that are not whole numbers from 0 to `longest`.
    """
    import torch

    if lengths.ndim != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(f"Lengths are whole numbers (batch,), not {lengths.dtype} {tuple(lengths.shape)}.")
    most = int(lengths.max()) if longest is None and len(lengths) else longest or 0
    if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > most):
        raise InputError(f"Lengths from {int(lengths.min())} to {int(lengths.max())}; expected 0 to {most}.")
    return packing(torch.arange(most) < lengths[:, None])


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, threads: int | None = None
) -> torch.Tensor:
    """Softmax attention within each sequence: rows (tokens, heads, head_dim) and `offsets` (batch + 1,) to the same.

    No padding is computed; this is `attention.flash` on packed rows, which says what is refused.
    """
    from bitwright.kernels.attention import flash

    out: torch.Tensor = flash(q, k, v, cu_seqlens_q=offsets, threads=threads)
    return out


def bias_gelu_(
    x: torch.Tensor, bias: torch.Tensor, approximate: Literal["none", "tanh"] = "none", threads: int | None = None
) -> torch.Tensor:
    """GELU(x + bias) in place, x contiguous float32 (rows, width), by the error function ("none") or by "tanh".

    Within 1e-6 of float64, relative where the result exceeds 1. Raises InputError for other types and shapes.
    """
    import torch

    if x.dtype != torch.float32 or x.ndim != 2 or not x.is_contiguous() or bias.shape != x.shape[1:]:
        raise InputError(f"Expected contiguous float32 (rows, width) and a bias (width,), not {x.dtype} {x.shape}.")
    if approximate not in ("none", "tanh"):
        raise InputError(f'GELU takes approximate="none" or "tanh", not {approximate!r}.')
    _native.bias_gelu(
        x.detach().numpy(), bias.detach().contiguous().numpy(), approximate == "tanh", thread_count(threads)
    )  # fmt: skip
    return x


def residual_norm(
    x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor,
    epsilon: float = 1e-12, restore: Packing | None = None, threads: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """LayerNorm(x + bias + residual) * gain + shift of float32 rows (rows, width) in one pass.

    With `restore` the rows go straight into the padded batch (batch, longest, width), whose padding is 0. Raises
    InputError for other types and shapes.
    """
    import torch

    if any(each.dtype != torch.float32 for each in (x, bias, residual, gain, shift)) or x.shape != residual.shape:
        raise InputError(f"Expected float32 rows of one shape, not {x.dtype} {x.shape}, {residual.shape}.")
    if x.ndim != 2 or any(each.shape != x.shape[1:] for each in (bias, gain, shift)) or not x.shape[1]:
        raise InputError(f"Expected rows (rows, width) and vectors (width,), not {tuple(x.shape)}, {bias.shape}.")
    if restore is not None and restore.tokens != len(x):
        raise InputError(f"{len(x)} rows do not fit the packing of {restore.tokens} tokens.")
    width = x.shape[1]
    out = torch.empty_like(x) if restore is None else x.new_zeros(restore.batch * restore.longest, width)
    place = torch.empty(0, dtype=torch.int64) if restore is None else restore.index
    rows, added, before, gains, shifts = (
        each.detach().contiguous().numpy() for each in (x, bias, residual, gain, shift)
    )
    _native.residual_norm(
        rows, added, before, gains, shifts, epsilon, place.numpy(), thread_count(threads), out.numpy()
    )  # fmt: skip
    return out if restore is None else out.view(restore.batch, restore.longest, width)
