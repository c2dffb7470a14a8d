"""Products with 4-bit weights whose scales and zero points are applied once per group, after the integer sums (MixPE).

Weights W (k, n) of groups G of g consecutive k: W = s[G, n] (q[k, n] - z[G, n]), q and z unsigned integers of `bits`.
Activations X (m, k): int8 codes with a scale t[m] per token, or float16. With

    P[m, n, G] = sum of x q over the group        R[m, G] = sum of x over the group

    Y[m, n] = t[m] sum over G of s[G, n] (P[m, n, G] - z[G, n] R[m, G])

is the same as multiplying dequantised weights, but the inner loop multiplies by small integers only, and R is shared by
all n. In int8 everything before s is exact; the float32 sum over groups is in ascending order.

Source: arXiv 2411.16158, dequantisation after the product of a group; the algebra follows from its two statements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.formats.base import exact_product
from bitwright.core.errors import InputError


@dataclass(frozen=True)
class GroupedWeights:
    """Codes uint8 (k, n), scales float32 (groups, n), zero points uint8 (groups, n), for groups of `group` rows; the
    last group may hold fewer."""

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8]
    bits: int
    group: int

    def dequantise(self) -> NDArray[np.float64]:
        """The weights the codes stand for, (k, n)."""
        each = np.repeat(np.arange(len(self.scale)), self.group)[: len(self.codes)]
        return np.asarray(self.scale.astype(np.float64)[each] * (self.codes.astype(np.int64) - self.zero[each]))

    @property
    def table_bits(self) -> int:
        """Stored bits of scales (16 each) and zero points."""
        return self.scale.size * (16 + self.bits)


def quantise_weights(
    w: ArrayLike, bits: int = 4, group: int = 128, symmetric: bool = False, half_scales: bool = False,
    short_last_group: bool = True,
) -> GroupedWeights:  # fmt: skip
    """Round W (k, n) to nearest codes per output column and group; `symmetric` has the zero point 2^(bits-1).

    `half_scales`: scales are float16 numbers, as tables of accelerators hold them. Without `short_last_group`, groups
    must divide k. Raises InputError for NaN or infinity, other shapes, bits outside 2..8, groups below 1, and weights
    too large for float16 scales.
    """
    weights = np.asarray(w, np.float32)
    if weights.ndim != 2 or not weights.size or not np.isfinite(weights).all():
        raise InputError(f"Weights are a finite matrix (k, n), not {weights.shape} with NaN or infinity.")
    if not 2 <= bits <= 8 or group < 1:
        raise InputError(f"Codes have 2 to 8 bits and groups at least one row; got {bits} bits, groups of {group}.")
    k, n = weights.shape
    if k % group and not short_last_group:
        raise InputError(f"Groups of {group} rows do not divide k = {k}; allow a short last group, or pad the weights.")
    top = (1 << bits) - 1
    starts = range(0, k, group)
    scale, zero = np.empty((len(starts), n), np.float32), np.empty((len(starts), n), np.uint8)
    codes = np.empty((k, n), np.uint8)
    for at, start in enumerate(starts):
        part = weights[start : start + group]
        if symmetric:
            half = 1 << (bits - 1)
            scale[at] = np.abs(part).max(axis=0) / (half - 1)
            zero[at] = half
        else:
            low, high = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
            scale[at] = (high - low) / top
        scale[at] = np.where(scale[at] > 0, np.maximum(scale[at], np.finfo(np.float32).tiny), 1)
        if half_scales:
            scale[at] = _half(scale[at])
        if not symmetric:
            zero[at] = np.clip(np.rint(-low / scale[at]), 0, top)
        codes[start : start + group] = np.clip(np.rint(part / scale[at]) + zero[at], 0, top)
    return GroupedWeights(codes, scale, zero, bits, group)


def _half(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to float16, at least its smallest subnormal number."""
    if float(scale.max()) > 65504:
        raise InputError(f"A scale of {float(scale.max()):g} is beyond float16 (65504); use float32 scales.")
    return np.maximum(scale.astype(np.float16), np.float16(2.0**-24)).astype(np.float32)


def group_products(x: ArrayLike, weights: GroupedWeights) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """P (groups, m, n) and R (groups, m) of int8 activations x (m, k), exact integers.

    Raises InputError for other shapes and types, and for zero points or codes beyond their bits.
    """
    codes = _checked(x, weights)
    if codes.dtype != np.int8:
        raise InputError(f"Integer group products take int8 activations, not {codes.dtype}.")
    products, sums = [], []
    for start in range(0, codes.shape[1], weights.group):
        part = codes[:, start : start + weights.group].astype(np.int64)
        products.append(exact_product(part, weights.codes[start : start + weights.group].T.astype(np.int64)))
        sums.append(part.sum(axis=1))
    return np.stack(products), np.stack(sums)


def float_group_products(x: ArrayLike, weights: GroupedWeights) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """P (groups, m, n) and R (groups, m) of float16 activations x (m, k): exact products, float32 sums, k ascending.

    Raises InputError as `group_products`.
    """
    codes = _checked(x, weights)
    if codes.dtype != np.float16:
        raise InputError(f"Group products in float32 take float16 activations, not {codes.dtype}.")
    real, integers = codes.astype(np.float32), weights.codes.astype(np.float32)
    groups, (m, n) = len(weights.scale), (codes.shape[0], integers.shape[1])
    products, sums = np.zeros((groups, m, n), np.float32), np.zeros((groups, m), np.float32)
    for k in range(codes.shape[1]):
        products[k // weights.group] += real[:, k, None] * integers[None, k]
        sums[k // weights.group] += real[:, k]
    return products, sums


def matmul(x: ArrayLike, weights: GroupedWeights, token_scale: ArrayLike | None = None) -> NDArray[np.float32]:
    """Y (m, n) float32 of int8 codes x (m, k) with `token_scale` (m,), or of float16 x, by late dequantisation.

    int8: integers up to the group's scale, then float32, groups ascending. float16: products of a significand and a
    code are exact in float32; sums over k and then over groups are float32, ascending. Raises InputError as
    `group_products`, and for missing or unusable token scales.
    """
    codes = _checked(x, weights)
    m, n = codes.shape[0], weights.codes.shape[1]
    total = np.zeros((m, n), np.float32)
    if codes.dtype == np.float16:
        if token_scale is not None:
            raise InputError("float16 activations have no token scale.")
        parts, row_sums = float_group_products(codes, weights)
        for at in range(len(weights.scale)):
            shift = weights.zero[at].astype(np.float32) * row_sums[at][:, None]
            total += weights.scale[at] * (parts[at] - shift)
        return total
    scale = np.asarray(token_scale, np.float32)
    if token_scale is None or scale.shape != (m,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise InputError(f"int8 activations need {m} positive token scales, not {token_scale!r:.80}.")
    products, sums = group_products(codes, weights)
    for at in range(len(weights.scale)):
        difference = products[at] - weights.zero[at].astype(np.int64) * sums[at][:, None]
        total += weights.scale[at] * difference.astype(np.float32)
    return np.asarray(total * scale[:, None], np.float32)


def quantise_tokens(x: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 codes and scales (m,) of activations x (m, k), one scale per token. Raises InputError for NaN, infinity."""
    real = np.asarray(x, np.float32)
    if real.ndim != 2 or not np.isfinite(real).all():
        raise InputError(f"Activations are a finite matrix (m, k), not {real.shape} with NaN or infinity.")
    scale = np.abs(real).max(axis=1) / 127
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return np.clip(np.rint(real / scale[:, None]), -127, 127).astype(np.int8), scale


@dataclass(frozen=True)
class DequantisationWork:
    """Multiplications by scales and zero points of a product (m, k) x (k, n), apart from the products themselves."""

    classical_reused: int  # each weight dequantised once and kept for all m
    classical: int  # dequantised anew for every row of x
    late: int


def dequantisation_work(m: int, n: int, k: int, group: int, zero_points: bool = True) -> DequantisationWork:
    """Classical and late dequantisation in operations: n k against 2 m n k / g (1 without zero points).

    Late is less for m < g / 2 with zero points (m < g without) when dequantised weights can be kept, and always less
    when they cannot. Raises InputError for extents below 1.
    """
    if min(m, n, k, group) < 1:
        raise InputError(f"Extents are at least 1, not m = {m}, n = {n}, k = {k}, groups of {group}.")
    groups = -(-k // group)
    return DequantisationWork(n * k, m * n * k, (2 if zero_points else 1) * m * n * groups)


def _checked(x: ArrayLike, weights: GroupedWeights) -> NDArray[np.int8] | NDArray[np.float16]:
    codes = np.asarray(x)
    if codes.ndim != 2 or codes.shape[1] != weights.codes.shape[0]:
        raise InputError(
            f"Activations {codes.shape} do not meet weights {weights.codes.shape}: expected (m, k), (k, n)."
        )
    if codes.dtype not in (np.int8, np.float16):
        raise InputError(f"Activations are int8 or float16, not {codes.dtype}.")
    if codes.dtype == np.float16 and not np.isfinite(codes).all():
        raise InputError("Activations hold NaN or infinity.")
    check_weights(weights)
    return codes


def check_weights(weights: GroupedWeights) -> None:
    """Raise InputError for codes or zero points beyond their bits, scales that are NaN or infinite, other shapes."""
    k, n = weights.codes.shape
    shape = (-(-k // weights.group), n)
    if weights.scale.shape != shape or weights.zero.shape != shape:
        raise InputError(
            f"Weights {(k, n)} in groups of {weights.group} have scales and zero points {shape}, not "
            f"{weights.scale.shape} and {weights.zero.shape}."
        )
    top = (1 << weights.bits) - 1
    for what, values in (("code", weights.codes), ("zero point", weights.zero)):
        if int(values.max()) > top or int(values.min()) < 0:
            raise InputError(f"A {what} is outside the 0 to {top} of {weights.bits} bits.")
    if not np.isfinite(weights.scale).all():
        raise InputError("A weight scale is NaN or infinite.")
