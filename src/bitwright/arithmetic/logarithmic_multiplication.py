"""L-Mul: products of floating-point numbers by one integer addition of their encodings.

With x = (1 + x_m) 2^x_e and y alike, the exact product is (1 + x_m + y_m + x_m y_m) 2^(x_e + y_e). L-Mul replaces
x_m y_m by a constant 2^-l(m), l(m) = m for m <= 3 mantissa bits, 3 for m = 4, 4 above. Two forms:

    algebraic   (1 + x_m + y_m + 2^-l) 2^(x_e + y_e), the formula of the paper
    adder       what an integer adder makes of the encodings: code(x) + code(y) - (bias << m) + 2^(m - l). A carry out
                of the mantissas goes to the exponent: with t = x_m + y_m + 2^-l >= 1 it yields 2 t 2^(x_e + y_e)

Both agree for t <= 1 and differ by the factor 2 t / (1 + t) up to t = 2 (by 4 (t - 1) / (1 + t) in the corner beyond).
The sign is the exclusive or. Zero and subnormal operands, and results below the smallest normal number, give zero;
results above the largest number give it in FP8 and infinity elsewhere. NaN and infinity propagate; FP8, whose codes
for them differ between formats and vendors, refuses them unless asked to propagate.

Source: Luo, Sun, Addition is All You Need for Energy-efficient Language Models, arXiv 2410.00907, section 2 (formula)
and its PTX simulation (adder); a Mitchell (1962) multiplier with another constant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.arithmetic.formats.elements import FLOATS
from bitwright.core.errors import InputError, UnknownNameError

Form = Literal["adder", "algebraic", "product"]
FORMS = ("adder", "algebraic", "product")
Offset = Literal["paper", "none", "auto"] | int | float
Floats = NDArray[np.float32]
MANTISSAS = (2, 3, 4, 7, 10, 23)
LARGEST_OFFSET = 0.25  # searches go from 0 to here; the mean of x_m y_m over uniform fractions


@dataclass(frozen=True)
class FloatFormat:
    """Sizes of a floating-point format. `special`: least magnitude code that is no finite number, NaN in E4M3 and
    infinity elsewhere; `saturates`: results end at the largest number."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    special: int
    saturates: bool = False

    @property
    def bias(self) -> int:
        """Of the stored exponent."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def infinite(self) -> bool:
        """Whether the format has infinities."""
        return self.special == ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(values(self.special - 1, self.name))


FORMATS: Mapping[str, FloatFormat] = {
    "e4m3": FloatFormat("e4m3", 4, 3, 0x7F, True),
    "e5m2": FloatFormat("e5m2", 5, 2, 0x7C, True),
    "bf16": FloatFormat("bf16", 8, 7, 0x7F80),
    "fp16": FloatFormat("fp16", 5, 10, 0x7C00),
    "fp32": FloatFormat("fp32", 8, 23, 0x7F800000),
}


def correction(mantissa_bits: int) -> float:
    """2^-l(m), what stands in for the product of the fractions (section 2)."""
    return float(2.0 ** -(mantissa_bits if mantissa_bits <= 3 else 3 if mantissa_bits == 4 else 4))


def codes(x: ArrayLike, fmt: str, nan: Literal["propagate"] | None = None) -> NDArray[np.int64]:
    """Encodings (unsigned) of x rounded to a format, ties to even; FP8 saturates.

    Raises InputError for integers, unknown formats, and NaN or infinity in FP8 unless `nan` is "propagate" (infinity
    is NaN in E4M3, which has none).
    """
    form, real = _format(fmt), np.asarray(x)
    if nan not in (None, "propagate"):
        raise UnknownNameError("policy for NaN", str(nan), ("propagate",))
    if not np.issubdtype(real.dtype, np.floating):
        raise InputError(f"L-Mul takes floating-point tensors, not {real.dtype}.")
    if form.saturates:
        special = ~np.isfinite(real)
        if special.any() and nan is None:
            raise InputError(
                f"{fmt} operands hold {special.sum()} values that are NaN or infinite and no policy for NaN is set: "
                'remove them or pass nan="propagate".'
            )
        flat = np.ascontiguousarray(_narrowed(np.where(special, 0, real))).reshape(1, -1)
        made = FLOATS[f"fp8_{fmt}"].encode(flat, np.ones(1, np.float32)) if real.size else flat.astype(np.uint8)
        found = np.asarray(made.reshape(real.shape), np.int64)
        reserved = np.where(np.isnan(real) | (not form.infinite), 0x7F, form.special)
        return np.asarray(np.where(special, reserved | (np.signbit(real) << 7), found))
    with np.errstate(over="ignore"):
        if form.name == "fp16":
            return real.astype(np.float16).view(np.uint16).astype(np.int64)
        if form.name == "fp32":
            return np.asarray(real.astype(np.float32).view(np.uint32).astype(np.int64))
        bits = _narrowed(real).view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.asarray(np.where(np.isnan(real), (bits >> 16) | 0x40, rounded))


def _narrowed(real: NDArray[Any]) -> Floats:
    """x as float32 for a later rounding to fewer bits: inexact values get an odd last bit (round to odd), so that they
    are not rounded twice to nearest; beyond float32 the largest number or, from infinity, infinity."""
    if real.dtype != np.float64:
        return np.asarray(real, np.float32)
    with np.errstate(over="ignore"):
        near = real.astype(np.float32)
    bits = near.view(np.uint32)
    exact = (near.astype(np.float64) == real) | np.isnan(real)
    beyond = np.abs(near.astype(np.float64)) > np.abs(real)
    truncated = bits - np.where(~exact & beyond, np.uint32(1), np.uint32(0)).astype(np.uint32)
    return np.asarray(np.where(exact, bits, truncated | np.uint32(1)).astype(np.uint32).view(np.float32))


def values(code: ArrayLike, fmt: str) -> NDArray[np.float64]:
    """What encodings mean."""
    form, number = _format(fmt), np.asarray(code, np.int64)
    m = form.mantissa_bits
    sign = np.where(number >> (form.exponent_bits + m) & 1, -1.0, 1.0)
    magnitude = number & ((1 << (form.exponent_bits + m)) - 1)
    exponent, mantissa = magnitude >> m, magnitude & ((1 << m) - 1)
    normal = np.ldexp(1.0 + mantissa / (1 << m), (exponent - form.bias).astype(np.int32))
    found = np.where(exponent > 0, normal, np.ldexp(mantissa / (1 << m), 1 - form.bias))
    found = np.where(magnitude >= form.special, np.nan, found)
    if form.infinite:
        found = np.where(magnitude == form.special, np.inf, found)
    return np.asarray(sign * found)


def multiply(
    x: ArrayLike, y: ArrayLike, fmt: str = "e4m3", form: Form = "adder", offset: Offset = "paper",
    nan: Literal["propagate"] | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Element-wise products of x and y, both rounded to `fmt` first; broadcast.

    `form`: "adder", "algebraic" (not rounded), or "product": the exact product, not rounded, flushed and saturated
    alike. `offset`: "paper" for 2^-l(m), "none" for 0 (Mitchell), "auto" for the constant of least squared relative
    error on these very products, an integer in units of the last mantissa bit, or a fraction. `nan` as in `codes`.

    Raises InputError as `codes` and for offsets outside 0 to 1, UnknownNameError for other forms.
    """
    layout = _format(fmt)
    _check_form(form)
    left, right = np.broadcast_arrays(codes(x, fmt, nan), codes(y, fmt, nan))
    m, special = layout.mantissa_bits, layout.special
    width, lowest = layout.exponent_bits + m, 1 << m
    a, b = left & ((1 << width) - 1), right & ((1 << width) - 1)
    sign = np.where((left ^ right) >> width & 1, -1.0, 1.0)
    zero = (a < lowest) | (b < lowest)
    if offset == "auto":
        kept = ~zero & (a < special) & (b < special)
        share = best_offset(values(a[kept], fmt), values(b[kept], fmt), m, form) if kept.any() else 0.0
    else:
        share = fraction(offset, m)
    if form == "adder":
        total = a + b - (layout.bias << m) + round(share * lowest)
        under, over = total < lowest, total >= special
        found = values(np.clip(total, 0, special - 1), fmt)
    else:
        x_m, y_m = (each & (lowest - 1) for each in (a, b))
        whole = 1 + x_m / lowest + y_m / lowest
        whole = whole + (share if form == "algebraic" else (x_m / lowest) * (y_m / lowest))
        with np.errstate(over="ignore"):
            found = np.ldexp(whole, ((a >> m) + (b >> m) - 2 * layout.bias).astype(np.int32))
        under, over = found < 2.0 ** (1 - layout.bias), found > layout.largest
    found = np.where(over, layout.largest if layout.saturates else np.inf, found)
    found = np.where(zero | under, 0.0, found)
    unbound = (a >= special) | (b >= special)
    wrong = unbound & (zero | (not layout.infinite)) | (a > special) | (b > special)
    found = np.where(wrong, np.nan, np.where(unbound, np.inf, found))
    return np.asarray(sign * found)


def round_mantissa(x: ArrayLike, mantissa_bits: int) -> Floats:
    """float32 x with so many mantissa bits, ties to even, exponents of float32; subnormal numbers become zero.

    Raises InputError for other widths than `MANTISSAS`, integers, NaN and infinity.
    """
    if mantissa_bits not in MANTISSAS:
        raise InputError(f"Mantissas of {', '.join(map(str, MANTISSAS))} bits are supported, not {mantissa_bits}.")
    real = np.asarray(x)
    if not np.issubdtype(real.dtype, np.floating):
        raise InputError(f"L-Mul takes floating-point tensors, not {real.dtype}.")
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(real, np.float32)
    if not np.isfinite(narrow).all():
        wrong = int((~np.isfinite(narrow)).sum())
        raise InputError(f"L-Mul products of NaN, infinity or numbers beyond float32: the tensor holds {wrong}.")
    drop = 23 - mantissa_bits
    bits = (_narrowed(real) if drop else narrow).view(np.uint32)
    if drop:
        bits = (bits + np.uint32((1 << (drop - 1)) - 1) + ((bits >> np.uint32(drop)) & np.uint32(1))) & np.uint32(
            0xFFFFFFFF ^ ((1 << drop) - 1)
        )
    made = bits.view(np.float32)
    return np.asarray(np.where(np.abs(made) < np.finfo(np.float32).tiny, np.float32(0), made))


_SUMS = {"bf16": "bf16", "fp16": "fp16", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}


def accumulator(text: str) -> tuple[int, int, int, float]:
    """Running sums by name: products between roundings (0: float32, never), mantissa bits, least normal exponent, and
    largest number. "fp32", or "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", rounded after every 32 products or, with "/n",
    every n. Raises InputError for anything else."""
    name, slash, size = text.partition("/")
    if text == "fp32":
        return 0, 23, -126, FORMATS["fp32"].largest
    if name not in _SUMS or (slash and not (re.fullmatch("[0-9]{1,9}", size) and int(size))):
        raise InputError(
            f"Accumulation in {text!r} asked for; expected fp32, or one of {', '.join(_SUMS)}, rounded after every 32 "
            'products or every n with "/n".'
        )
    form = FORMATS[_SUMS[name]]
    return int(size) if slash else 32, form.mantissa_bits, 1 - form.bias, form.largest


def matmul(
    a: ArrayLike, b: ArrayLike, mantissa: int = 4, form: Form = "adder", offset: Offset = "paper", threads: int = 1,
    accumulation: str = "fp32", exponents: str = "fp32",
) -> Floats:  # fmt: skip
    """A (m, k) @ B (k, n) with every product an L-Mul of operands rounded to `mantissa` bits: float32 (m, n).

    The range of operands and products is that of `exponents`, a name of `FORMATS`: what lies below its least normal
    number counts as zero, products above its largest become that or infinity, as in `multiply`. The adder form (native
    code) sums in float32, k ascending; with another `accumulation` (see `accumulator`) each run of n products is summed
    so, then added to the total, which is rounded, ties to even, and saturates. The algebraic form is linear in each
    operand but for a constant, so it is three ordinary products of X, 2^x_e and Y, 2^y_e, exact but for their float32
    sums; "product" is the exact product of the rounded operands, the peer. `offset` "auto" is `best_matmul_offset`.

    Raises InputError as `round_mantissa`, for shapes that do not fit, and for few-bit sums of other forms.
    """
    _check_form(form)
    left, right = round_mantissa(a, mantissa), round_mantissa(b, mantissa)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise InputError(f"Product of {left.shape} by {right.shape} asked for; expected (m, k) by (k, n).")
    sums = accumulator(accumulation)
    if form == "product" and not sums[0]:
        return np.asarray(left @ right, np.float32)
    if form != "adder" and (sums[0] or exponents != "fp32"):
        what = f"Sums in {accumulation}" if sums[0] else f"Products in the range of {exponents}"
        raise InputError(f"{what} are computed for the adder form, not for the form {form}.")
    share = best_matmul_offset(left, right, mantissa, form) if offset == "auto" else fraction(offset, mantissa)
    if form == "algebraic":
        left_power, right_power = _powers(left), _powers(right)
        made = left @ right_power + left_power @ right + np.float32(share - 1) * (left_power @ right_power)
        return np.asarray(made, np.float32)
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    constant = (127 << 23) - round(share * (1 << 23))
    limits = _format(exponents)
    _native.logarithmic_matmul(
        np.ascontiguousarray(left), np.ascontiguousarray(right), constant, *sums, 2.0 ** (1 - limits.bias),
        limits.largest, limits.saturates, threads, out,
    )  # fmt: skip
    return out


def _powers(x: Floats) -> Floats:
    """sign * 2^exponent of every number, zero for zero."""
    return np.asarray((x.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32))


def fraction(offset: Offset, mantissa: int) -> float:
    """The constant of an offset other than "auto" as a fraction. Raises InputError outside 0 to below 1."""
    if offset == "paper":
        return correction(mantissa)
    if offset == "none":
        return 0.0
    if isinstance(offset, int | float) and not isinstance(offset, bool):
        share = offset / (1 << mantissa) if isinstance(offset, int) else float(offset)
        if 0 <= share < 1:
            return share
    raise InputError(
        f"The offset is paper, none, auto, an integer from 0 to {(1 << mantissa) - 1} in units of the last of "
        f"{mantissa} mantissa bits, or a fraction from 0 to below 1; not {offset!r}."
    )


def best_offset(x: ArrayLike, y: ArrayLike, mantissa: int, form: Form = "adder") -> float:
    """The constant, a multiple of 2^-m from 0 to 1/4, of least squared relative error of the products x * y.

    x and y: finite values of equal shape, not zero, rounded to `mantissa` bits here.
    """
    exact = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    left, right = (np.frexp(np.abs(round_mantissa(each, mantissa).astype(np.float64))) for each in (x, y))
    ratio = np.abs(exact) / np.ldexp(0.25, left[1] + right[1])
    ratio, base = ratio.reshape(-1), (2 * left[0] + 2 * right[0] - 2).reshape(-1)

    def cost(share: float) -> float:
        t = base + share
        whole = np.where(t < 1, 1 + t, np.where(t < 2, 2 * t, 4 * t - 4)) if form == "adder" else 1 + t
        return float(np.square(whole / ratio - 1).mean())

    return _least(cost, mantissa)


def best_matmul_offset(a: ArrayLike, b: ArrayLike, mantissa: int, form: Form = "adder", sample: int = 64) -> float:
    """The constant, a multiple of 2^-m from 0 to 1/4, of least squared error of A @ B.

    Compared on up to `sample` evenly spaced rows of A (m, k) and columns of B (k, n).
    """
    left, right = np.asarray(a, np.float32), np.asarray(b, np.float32)
    left = left[np.unique(np.linspace(0, len(left) - 1, min(sample, len(left))).astype(int))]
    right = right[:, np.unique(np.linspace(0, right.shape[1] - 1, min(sample, right.shape[1])).astype(int))]
    exact = left.astype(np.float64) @ right
    return _least(lambda share: float(np.square(matmul(left, right, mantissa, form, share) - exact).mean()), mantissa)


def _least(cost: Any, mantissa: int) -> float:
    """The multiple of 2^-m of least cost among 33 over the range, then 33 around the best of them."""
    low, high, best = 0.0, LARGEST_OFFSET, 0.0
    for _ in range(2):
        steps = np.unique(np.rint(np.linspace(low, high, 33) * (1 << mantissa))) / (1 << mantissa)
        best = min((float(each) for each in steps), key=cost)
        gap = LARGEST_OFFSET / 32
        low, high = max(best - gap, 0.0), min(best + gap, LARGEST_OFFSET)
    return best


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise UnknownNameError("L-Mul form", form, FORMS)


def _format(fmt: str) -> FloatFormat:
    if fmt not in FORMATS:
        raise UnknownNameError("floating-point format", fmt, FORMATS)
    return FORMATS[fmt]
