"""Uniform integer quantisation of real tensors, numpy or torch, with one scale per tensor, channel or group.

A real x is stored as an integer code q with x ~ scale * (q - zero_point). The functions below take a numpy array or a
torch tensor and return the same kind on the same device; nothing here imports torch.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018, section 2.1 (affine mapping, zero exactly representable); group-wise scales as in Shen et al., Q-BERT,
AAAI 2020, section 3.2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitwright.core.errors import InputError

# A numpy array or a torch tensor; the two share every operation used here.
Array = Any


@dataclass(frozen=True)
class Quantised:
    """Integer codes of a real tensor: `x ~ scale * (codes - zero_point)`. Read the attributes; it does not unpack.

    `codes` has the shape of x: int8 (uint8 when unsigned) up to 8 bits, int16 (int32 when unsigned) above.
    `scale` and `zero_point` have shape () per tensor; the shape of x with every axis not in `axis` reduced to 1 per
    channel (so they broadcast); `(..., n / group)` per group of `group` consecutive values of the last axis.
    `zero_point` is None for symmetric codes, otherwise int32 of the shape of `scale`.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    bits: int
    group: int | None = None

    def dequantise(self) -> Array:
        """The real tensor the codes stand for, shape of `codes`, dtype of `scale`."""
        codes = _cast(_grouped(self.codes, self.group), self.scale.dtype)
        scale, zero = _expanded(self.scale, self.group), _expanded(self.zero_point, self.group)
        real = codes * scale if zero is None else (codes - _cast(zero, self.scale.dtype)) * scale
        return real.reshape(self.codes.shape)


def quantise_symmetric(
    x: Array,
    bits: int = 8,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    full_range: bool = False,
) -> Quantised:
    """Quantise to signed codes with zero point 0: `scale = max|x| / (2^(bits-1) - 1)`, codes rounded half to even.

    `axis`: the axis or axes that keep a scale of their own (0 for the output channels of a `(out, in)` weight);
    `group`: one scale for every `group` consecutive values of the last axis; neither: one scale for the tensor.
    Codes are in -(2^(bits-1)-1) .. 2^(bits-1)-1. With `full_range` they reach -2^(bits-1), and the scale is the
    smallest at which neither the largest nor the smallest value saturates.
    A part that is all zero gets scale 1. float16 and bfloat16 give float32 scales; integers are taken as float32.

    Raises InputError for NaN or infinite values, an empty tensor, bits outside 2..16, an unknown axis, a group that
    does not divide the last axis, and `axis` given together with `group`.
    """
    xp, real = _prepare(x, bits, group)
    low, high = _extremes(xp, real, axis, group)
    top = 2 ** (bits - 1) - 1
    bound = xp.maximum(high / top, low / -(top + 1)) if full_range else xp.maximum(high / top, -low / top)
    scale = _usable(xp, bound)
    codes = xp.clip(xp.round(real / scale), -top - 1 if full_range else -top, top)
    codes = _cast(codes, xp.int8 if bits <= 8 else xp.int16).reshape(x.shape)
    return Quantised(codes, _reduced(scale, group), None, bits, group)


def quantise_asymmetric(
    x: Array,
    bits: int = 8,
    axis: int | tuple[int, ...] | None = None,
    group: int | None = None,
    signed: bool = False,
) -> Quantised:
    """Quantise to codes 0 .. 2^bits - 1 (-2^(bits-1) .. 2^(bits-1)-1 when `signed`) with an integer zero point.

    The range is [min(x, 0), max(x, 0)], so that 0 is represented exactly (by the zero point) and rounding is half to
    even. Parts (`axis`, `group`), all-zero parts, dtypes and errors as in `quantise_symmetric`.
    """
    xp, real = _prepare(x, bits, group)
    low, high = _extremes(xp, real, axis, group)
    low, high = xp.clip(low, None, 0), xp.clip(high, 0, None)
    levels = 2**bits - 1
    scale = _usable(xp, high / levels - low / levels)
    zero = xp.clip(xp.round(-low / scale), 0, levels)
    codes = xp.clip(xp.round(real / scale) + zero, 0, levels)
    if signed:
        codes, zero = codes - 2 ** (bits - 1), zero - 2 ** (bits - 1)
        integer = xp.int8 if bits <= 8 else xp.int16
    else:
        integer = xp.uint8 if bits <= 8 else xp.int32
    codes = _cast(codes, integer).reshape(x.shape)
    return Quantised(codes, _reduced(scale, group), _cast(_reduced(zero, group), xp.int32), bits, group)


def quantise_with(x: Array, scale: Array, bits: int = 8) -> Quantised:
    """Quantise symmetrically with a known scale (from calibration) that broadcasts against x; values beyond saturate.

    Raises InputError for NaN or infinite values, scales that are not positive and finite, and bits outside 2..16.
    """
    xp, real = _prepare(x, bits, None)
    scale = _cast(xp.asarray(scale), real.dtype)
    if not bool(((scale > 0) & xp.isfinite(scale)).all()):
        raise InputError("Every quantisation scale must be positive and finite.")
    top = 2 ** (bits - 1) - 1
    codes = xp.clip(xp.round(real / scale), -top, top)
    return Quantised(_cast(codes, xp.int8 if bits <= 8 else xp.int16), scale, None, bits)


def _prepare(x: Array, bits: int, group: int | None) -> tuple[Any, Array]:
    """Check x and the width; return the array module and x as float, its last axis split into groups."""
    if not 2 <= bits <= 16:
        raise InputError(f"Cannot quantise to {bits} bits; give 2 to 16.")
    xp = np if isinstance(x, np.ndarray | np.generic) else sys.modules.get("torch")
    if xp is None or not (xp is np or isinstance(x, xp.Tensor)):
        raise InputError(f"Expected a numpy array or a torch tensor, got {type(x).__name__}.")
    shape = tuple(x.shape)
    if 0 in shape:
        raise InputError(f"Cannot quantise an empty tensor of shape {shape}.")
    if group is not None and (not shape or group < 1 or shape[-1] % group):
        raise InputError(f"Groups of {group} do not divide the last axis of shape {shape}.")
    real = _cast(x if xp is np else x.detach(), xp.float64 if x.dtype == xp.float64 else xp.float32)
    finite = xp.isfinite(real)
    if not bool(finite.all()):
        nans = int(xp.isnan(real).sum())
        infinite = int((~finite).sum()) - nans
        raise InputError(f"Cannot quantise a tensor of shape {shape} with {nans} NaN and {infinite} infinite values.")
    return xp, _grouped(real, group)


def _extremes(xp: Any, real: Array, axis: int | tuple[int, ...] | None, group: int | None) -> tuple[Array, Array]:
    """Smallest and largest value of every part that has a scale of its own, kept broadcastable."""
    rank = real.ndim
    reduced: tuple[int, ...]
    if group is not None:
        if axis is not None:
            raise InputError("Give either an axis (one scale per channel) or a group size, not both.")
        reduced, keep = (rank - 1,), True
    elif axis is None:
        reduced, keep = tuple(range(rank)), False
    else:
        kept = (axis,) if isinstance(axis, int) else tuple(axis)
        if any(not -rank <= a < rank for a in kept):
            raise InputError(f"Axis {axis} is not an axis of shape {tuple(real.shape)}.")
        reduced, keep = tuple(a for a in range(rank) if a not in {k % rank for k in kept}), True
    if not reduced:  # a scale per value (torch would take an empty tuple for "all axes")
        return real, real
    return xp.amin(real, axis=reduced, keepdims=keep), xp.amax(real, axis=reduced, keepdims=keep)


def _usable(xp: Any, scale: Array) -> Array:
    """1 where a part is all zero; otherwise at least the smallest normal number, so that no scale underflows to 0."""
    return xp.where(scale == 0, xp.ones_like(scale), xp.clip(scale, float(xp.finfo(scale.dtype).tiny), None))


def _grouped(x: Array, group: int | None) -> Array:
    return x if group is None else x.reshape((*x.shape[:-1], x.shape[-1] // group, group))


def _reduced(scale: Array, group: int | None) -> Array:
    return scale if group is None else scale[..., 0]


def _expanded(scale: Array | None, group: int | None) -> Array | None:
    return scale if scale is None or group is None else scale[..., None]


def _cast(x: Array, dtype: Any) -> Array:
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x).astype(dtype, copy=False)
    return x.to(dtype)
