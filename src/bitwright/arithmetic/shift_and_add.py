"""Products by shifts and by masked sums, exact on integers: the cheap primitives of ShiftAddViT.

`shift_matmul`: y[m, n] = sum over k of s[k, n] * (x[m, k] >> -p[k, n]), s in -1, 0, 1 and p in -14 .. 0. Arithmetic
shifts round towards minus infinity, so a term differs by less than one unit from x * 2^p.
`powers_of_two`: weights as sums of one or two such signed powers (two: SP2, of APoT, arXiv 1909.13144).
`masked_sums`: y[m, n] = sum of v[k, n] over the k that a binary row selects; no multiplication at all.

Source: arXiv 2306.06446 (NeurIPS 2023), MatShift and MatAdd.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.formats.base import exact_product
from bitwright.core.errors import InputError

LOWEST_EXPONENT = -14  # of five-bit shifts


def powers_of_two(weights: ArrayLike, terms: int = 1) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Exponents -14 .. 0 and signs -1, 0, 1 (terms, ...) whose powers add up to about the weights, largest first.

    Every term is the power nearest in logarithm to what the terms before it left, with a sign of its own; a rest below
    2^-15 is left. Zero has signs 0. One term is off by less than 42 % of a weight of magnitude 2^-14 .. 1, two by less
    than 11 % of one of 2^-11 .. 1. Raises InputError for other counts than 1 and 2 and weights that are not finite.
    """
    rest = np.array(weights, np.float64)
    if terms not in (1, 2):
        raise InputError(f"Weights as sums of {terms} powers of two were asked for: expected 1 or 2.")
    if not np.isfinite(rest).all():
        raise InputError("Powers of two of weights that are not finite were asked for.")
    smallest = 2.0 ** (LOWEST_EXPONENT - 1)
    exponents, signs = np.zeros((2, terms, *rest.shape), np.int8)
    for term in range(terms):
        magnitude = np.clip(np.abs(rest), smallest, 1.0)
        exponents[term] = np.maximum(np.rint(np.log2(magnitude)), LOWEST_EXPONENT)
        signs[term] = np.where((term > 0) & (np.abs(rest) < smallest), 0, np.sign(rest))
        rest -= signs[term] * np.exp2(exponents[term].astype(np.float64))
    return exponents, signs


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
