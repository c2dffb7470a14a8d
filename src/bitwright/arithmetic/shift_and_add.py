"""Products by shifts and by masked sums, exact on integers: the cheap primitives of ShiftAddViT.

`shift_matmul`: y[m, n] = sum over k of s[k, n] * (x[m, k] >> -p[k, n]), s in -1, 0, 1 and p in -14 .. 0. Arithmetic
shifts round towards minus infinity, so a term differs by less than one unit from x * 2^p.
`masked_sums`: y[m, n] = sum of v[k, n] over the k that a binary row selects; no multiplication at all.

Source: arXiv 2306.06446 (NeurIPS 2023), MatShift and MatAdd.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.formats.base import exact_product
from bitwright.core.errors import InputError

LOWEST_EXPONENT = -14  # of five-bit shifts


def shift_matmul(x: ArrayLike, exponent: ArrayLike, sign: ArrayLike) -> NDArray[np.int64]:
    """Integer x (m, k), exponents and signs (k, n) -> int64 (m, n).

    Done as one masked product per exponent that occurs. Raises InputError for other shapes and types, exponents
    outside -14..0 and signs other than -1, 0, 1.
    """
    values, powers, signs = np.asarray(x), np.asarray(exponent), np.asarray(sign)
    if values.ndim != 2 or powers.shape != signs.shape or powers.ndim != 2 or values.shape[1] != powers.shape[0]:
        raise InputError(
            f"Shifts of {values.shape} by {powers.shape} and {signs.shape}: expected (m, k), (k, n), (k, n)."
        )
    if not all(np.issubdtype(each.dtype, np.integer) for each in (values, powers, signs)):
        raise InputError(f"Shifts are of integers by integers, not {values.dtype}, {powers.dtype}, {signs.dtype}.")
    if powers.size and (powers.min() < LOWEST_EXPONENT or powers.max() > 0 or np.abs(signs).max() > 1):
        raise InputError(
            f"Exponents from {powers.min()} to {powers.max()}: expected {LOWEST_EXPONENT} to 0, signs -1 to 1."
        )
    total = np.zeros((values.shape[0], powers.shape[1]), np.int64)
    for power in np.unique(powers):
        chosen = np.where(powers == power, signs, 0).astype(np.int64)
        total += exact_product(values.astype(np.int64) >> int(-power), chosen.T)
    return total


def masked_sums(mask: ArrayLike, v: ArrayLike) -> NDArray[np.int64] | NDArray[np.float64]:
    """Binary mask (m, k) of 0 and 1 selects rows of v (k, n): (m, n), int64 for integers, float64 otherwise.

    Raises InputError for other shapes and masks.
    """
    selected, values = np.asarray(mask), np.asarray(v)
    if selected.ndim != 2 or values.ndim != 2 or selected.shape[1] != values.shape[0]:
        raise InputError(f"A mask {selected.shape} does not select rows of {values.shape}: expected (m, k) and (k, n).")
    if not np.isin(selected, (0, 1)).all():
        raise InputError("Masks hold 0 and 1 only.")
    if np.issubdtype(values.dtype, np.integer):
        return exact_product(selected.astype(np.int64), values.T.astype(np.int64))
    return np.asarray(selected.astype(np.float64) @ values.astype(np.float64))


def to_fixed_point(x: ArrayLike, integer_bits: int = 16, fraction_bits: int = 16) -> NDArray[np.int64]:
    """x as fixed-point integers in units of 2^-fraction_bits, rounded down and clipped. Raises InputError for NaN."""
    real = np.asarray(x, np.float64)
    if np.isnan(real).any():
        raise InputError("Fixed-point numbers of NaN were asked for.")
    top = 1 << (integer_bits + fraction_bits - 1)
    return np.clip(np.floor(real * (1 << fraction_bits)), -top, top - 1).astype(np.int64)
