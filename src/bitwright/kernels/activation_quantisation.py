"""Activations kept for the backward pass in 8, 4 or 2 bits, with a range for every group of channels or heads.

A code is round((x - low) * (2^bits - 1) / range), rounded stochastically without bias or to nearest, and saturates
outside the range; the value is restored as code * range / (2^bits - 1) + low.

Source: arXiv 2111.11124 (quantiser, head-wise groups, running estimates of the ranges).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.threads import thread_count

if TYPE_CHECKING:
    import torch

Rounding = Literal["stochastic", "nearest"]
BITS = (2, 4, 8)


@dataclass(frozen=True)
class GroupLayout:
    """Where the groups of a tensor lie: it is (rows, inner) in memory order, and row r belongs to group r % groups."""

    groups: int
    inner: int


@dataclass(frozen=True)
class QuantisedActivation:
    """Codes uint8 (rows * bytes of a row), the ranges they were made with, float32 (groups,), and what to restore."""

    codes: torch.Tensor
    low: torch.Tensor
    range: torch.Tensor
    layout: GroupLayout
    bits: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and ranges."""
        return sum(each.numel() * each.element_size() for each in (self.codes, self.low, self.range))


def group_layout(shape: tuple[int, ...], groups: int) -> GroupLayout:
    """Groups along axis 1 of tensors with four axes (heads, image channels), along the last axis of others.

    Raises InputError where `groups` does not divide that axis.
    """
    if groups < 1 or not shape or 0 in shape:
        raise InputError(f"{groups} groups of a tensor {tuple(shape)}; expected at least one value and one group.")
    axis = 1 if len(shape) == 4 else len(shape) - 1
    if shape[axis] % groups:
        raise InputError(f"{groups} groups do not divide axis {axis} of {tuple(shape)}; choose a divisor.")
    inner = shape[axis] // groups
    for size in shape[axis + 1 :]:
        inner *= size
    return GroupLayout(groups, inner)


def _flat(x: torch.Tensor) -> torch.Tensor:
    import torch

    if not x.is_floating_point():
        raise InputError(f"Activations are floating point, not {x.dtype}.")
    if x.device.type != "cpu":
        raise InputError(f"Activations on {x.device} were given; this kernel runs on the CPU.")
    return x.detach().to(torch.float32).contiguous().view(-1)


def group_ranges(x: torch.Tensor, layout: GroupLayout, threads: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Least value and range (largest minus least) of every group, float32 (groups,) each; NaN where x holds NaN.

    Raises InputError for tensors that are not floating point or not on the CPU.
    """
    import torch

    flat = _flat(x)
    low, high = torch.empty(layout.groups), torch.empty(layout.groups)
    _native.group_ranges(
        flat.numpy(), layout.groups, layout.inner, thread_count(threads), low.numpy(), high.numpy()
    )  # fmt: skip
    return low, high - low


def quantise(
    x: torch.Tensor, layout: GroupLayout, low: torch.Tensor, span: torch.Tensor, bits: int = 8,
    rounding: Rounding = "stochastic", seed: int = 0, threads: int | None = None,
) -> QuantisedActivation:  # fmt: skip
    """Codes of x in the ranges `low` to `low + span`, float32 (groups,) each, of which copies are kept.

    Values outside saturate; a group without range (constant) keeps `low`. `seed` chooses the random bits of stochastic
    rounding, which depend on it and on the position alone. Raises InputError for other widths and ranges that are not
    finite.
    """
    import torch

    if bits not in BITS:
        raise InputError(f"Activations are kept in {', '.join(map(str, BITS))} bits, not {bits}.")
    if rounding not in ("stochastic", "nearest"):
        raise InputError(f"Rounding is stochastic or nearest, not {rounding!r}.")
    if low.shape != (layout.groups,) or span.shape != (layout.groups,):
        raise InputError(f"Ranges {tuple(low.shape)} and {tuple(span.shape)} do not fit {layout.groups} groups.")
    if not (torch.isfinite(low).all() and torch.isfinite(span).all() and (span >= 0).all()):
        raise InputError("Ranges of activations are finite and not negative; these are not (NaN in the activations?).")
    flat = _flat(x)
    rows = flat.numel() // layout.inner
    kept_low, kept_span = low.to(torch.float32).clone(), span.to(torch.float32).clone()
    codes = torch.empty(rows * -(-layout.inner * bits // 8), dtype=torch.uint8)
    _native.quantise_groups(
        flat.numpy(), layout.groups, layout.inner, bits, kept_low.numpy(), kept_span.numpy(), rounding == "stochastic",
        seed & 0xFFFFFFFF, thread_count(threads), codes.numpy(),
    )  # fmt: skip
    return QuantisedActivation(codes, kept_low, kept_span, layout, bits, x.shape, x.dtype)


def dequantise(kept: QuantisedActivation, threads: int | None = None) -> torch.Tensor:
    """The values that the codes stand for, in the shape and type of the tensor they were made from."""
    import torch

    out = torch.empty(kept.shape, dtype=torch.float32)
    _native.dequantise_groups(
        kept.codes.numpy(), kept.layout.groups, kept.layout.inner, kept.bits, kept.low.numpy(), kept.range.numpy(),
        thread_count(threads), out.view(-1).numpy(),
    )  # fmt: skip
    return out.to(kept.dtype)
