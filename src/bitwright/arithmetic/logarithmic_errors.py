"""Errors of L-Mul products and dot products, measured and analytic, on random pairs or on the values of a tensor.

References are the products of the unrounded operands. A gain that is common to all products (the bias) is harmless
where a scale cancels it, as in front of a normalisation; `DotProductError` tells it from the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.logarithmic_multiplication import (
    FORMS,
    Form,
    Offset,
    best_offset,
    fraction,
    multiply,
    round_mantissa,
)
from bitwright.core.errors import InputError, UnknownNameError

Data = ArrayLike | tuple[ArrayLike, ArrayLike] | Literal["uniform", "normal"]


@dataclass(frozen=True)
class ErrorReport:
    """Relative errors of single products: mean of the absolute error, mean of the error (bias), largest."""

    mean_absolute: float
    bias: float
    largest: float


def error(
    mantissa: int | str, data: Data = "uniform", form: Form = "adder", offset: Offset = "paper",
    pairs: int = 1_000_000, seed: int = 0,
) -> ErrorReport:  # fmt: skip
    """Error of products of random pairs: uniform in [1, 2), normal, or pairs of `data`'s values, zeros left out; of a
    tuple of two arrays, every pair has one value of each.

    `mantissa`: bits, with float32 exponents, or the name of a format, whose range and flushing then count too. The form
    "product" is the exact product rounded to the same mantissa, the peer. Raises InputError as `round_mantissa` or
    `multiply`, and for data without a value other than zero.
    """
    x, y = _pairs(data, pairs, seed)
    exact = x.astype(np.float64) * y
    if isinstance(mantissa, str):
        found = multiply(x, y, mantissa, form, offset)
        if form == "product":
            found = multiply(found, np.ones(1), mantissa, form)
    else:
        found = _products(x, y, mantissa, form, offset)
        if form == "product":
            found = round_mantissa(found.astype(np.float32), mantissa).astype(np.float64)
    relative = found / exact - 1
    return ErrorReport(float(np.abs(relative).mean()), float(relative.mean()), float(np.abs(relative).max()))


@dataclass(frozen=True)
class DotProductError:
    """Errors of dot products over the root mean square of the exact ones: all of it, and what is left when the common
    gain is divided out."""

    relative_rms: float
    gain: float
    rms_without_gain: float


def dot_product_error(
    mantissa: int, length: int = 1024, form: Form = "adder", offset: Offset = "paper", count: int = 1000, seed: int = 0,
) -> DotProductError:  # fmt: skip
    """Of dot products of normal vectors, summed exactly. "product": every product is rounded to the same mantissa."""
    if count < 1 or length < 1:
        raise InputError(f"{count} dot products of {length} values asked for; expected at least one of each.")
    rng = np.random.default_rng(seed)
    found, exact = np.zeros(count), np.zeros(count)
    for start in range(0, count, 100):
        size = min(100, count - start)
        x, y = rng.normal(size=(2, size, length)).astype(np.float32)
        each = _products(x, y, mantissa, form, offset)
        if form == "product":
            each = round_mantissa(each.astype(np.float32), mantissa).astype(np.float64)
        found[start : start + size] = each.sum(-1)
        exact[start : start + size] = (x.astype(np.float64) * y).sum(-1)
    power = float(np.square(exact).sum())
    gain = float((found * exact).sum()) / power
    rms, rest = (np.sqrt(np.square(part).sum() / power) for part in (found - exact, found / gain - exact))
    return DotProductError(float(rms), gain, float(rest))


def expected_error(
    mantissa: int | None = None, form: Form = "adder", offset: Offset = "paper", bits: int = 11
) -> ErrorReport:
    """Analytic error for operands uniform in [1, 2): the mean over (2^bits)^2 cells of both fractions.

    Without `mantissa` operands are not rounded and the constant is that of wide mantissas, 2^-4. Raises InputError for
    the form "product", and for mantissas that the cells do not resolve.
    """
    if form not in FORMS:
        raise UnknownNameError("L-Mul form", form, FORMS)
    if form == "product":
        raise InputError("The analytic error is that of the forms adder and algebraic, not of exact products.")
    if mantissa is not None and mantissa > bits - 3:
        raise InputError(f"Cells of 2^-{bits} do not resolve {mantissa} mantissa bits; leave the mantissa out.")
    points = 1 + (np.arange(1 << bits) + 0.5) / (1 << bits)
    held = points if mantissa is None else round_mantissa(points, mantissa).astype(np.float64)
    share = fraction(offset, 23 if mantissa is None else mantissa)
    carry = held >= 2  # rounded up to the next binade: fraction 0, twice the weight
    part, weight = np.where(carry, 0.0, held - 1), np.where(carry, 2.0, 1.0)
    total = part[:, None] + part[None] + share
    whole = np.where(total < 1, 1 + total, np.where(total < 2, 2 * total, 4 * total - 4))
    made = (whole if form == "adder" else 1 + total) * weight[:, None] * weight[None]
    relative = made / (points[:, None] * points[None]) - 1
    return ErrorReport(float(np.abs(relative).mean()), float(relative.mean()), float(np.abs(relative).max()))


def best_constant(data: Data, mantissa: int, form: Form = "adder", pairs: int = 100_000, seed: int = 0) -> float:
    """`best_offset` over random pairs of `data`'s values."""
    return best_offset(*_pairs(data, pairs, seed), mantissa, form)


def _products(
    x: NDArray[np.float32], y: NDArray[np.float32], mantissa: int, form: Form, offset: Offset
) -> NDArray[np.float64]:
    left, right = round_mantissa(x, mantissa), round_mantissa(y, mantissa)
    if form == "product":
        return left.astype(np.float64) * right
    share = best_offset(x, y, mantissa, form) if offset == "auto" else fraction(offset, mantissa)
    return multiply(left, right, "fp32", form, share)


def _pairs(data: Data, pairs: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if pairs < 1:
        raise InputError(f"Errors of {pairs} pairs asked for; expected at least one.")
    rng = np.random.default_rng(seed)
    if isinstance(data, str):
        if data not in ("uniform", "normal"):
            raise InputError(f'Data is "uniform", "normal" or a tensor, not {data!r}.')
        x, y = rng.uniform(1, 2, (2, pairs)) if data == "uniform" else rng.normal(size=(2, pairs))
    else:
        pools = []
        for part in data if isinstance(data, tuple) else (data, data):
            with np.errstate(over="ignore"):
                pool = np.asarray(part, np.float32).reshape(-1)
            pool = pool[~(np.abs(pool) < np.finfo(np.float32).tiny)]  # L-Mul flushes subnormal numbers to zero
            if not pool.size or not np.isfinite(pool).all():
                raise InputError(f"Data of {pool.size} normal float32 values; expected some, all of them finite.")
            pools.append(pool)
        x, y = (rng.choice(pool, pairs) for pool in pools)
    return x.astype(np.float32), y.astype(np.float32)
