"""L-Mul: products of floating-point numbers by one integer addition of their encodings.

With x = (1 + x_m) 2^x_e and y alike, the exact product is (1 + x_m + y_m + x_m y_m) 2^(x_e + y_e). L-Mul replaces
x_m y_m by a constant 2^-l(m), l(m) = m for m <= 3 mantissa bits, 3 for m = 4, 4 above. Two forms:

    algebraic   (1 + x_m + y_m + 2^-l) 2^(x_e + y_e), the formula of the paper
    adder       what an integer adder makes of the encodings: code(x) + code(y) - (bias << m) + 2^(m - l). A carry out
                of the mantissas goes to the exponent: with t = x_m + y_m + 2^-l >= 1 it yields 2 t 2^(x_e + y_e)

Both agree for t <= 1 and differ by the factor 2 t / (1 + t) up to t = 2 (by 4 (t - 1) / (1 + t) in the corner beyond).
The sign is the exclusive or. Zero and subnormal operands, and results below the smallest normal number, give zero;
results above the largest number give it in FP8 and infinity elsewhere; NaN and infinity propagate (FP8 refuses them).

Source: Luo, Sun, Addition is All You Need for Energy-efficient Language Models, arXiv 2410.00907, section 2 (formula)
and its PTX simulation (adder); a Mitchell (1962) multiplier with another constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.arithmetic.formats.elements import FLOATS
from bitwright.core.errors import InputError, UnknownNameError

Form = Literal["adder", "algebraic"]
Offset = Literal["paper", "none"] | float
Floats = NDArray[np.float32]
MANTISSAS = (2, 3, 4, 7, 10, 23)


@dataclass(frozen=True)
class FloatFormat:
    """Sizes of a floating-point format; `saturates`: no infinity, results end at `largest`."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    saturates: bool = False

    @property
    def bias(self) -> int:
        """Of the stored exponent."""
        return (1 << (self.exponent_bits - 1)) - 1


FORMATS: Mapping[str, FloatFormat] = {
    "e4m3": FloatFormat("e4m3", 4, 3, 448.0, True),
    "e5m2": FloatFormat("e5m2", 5, 2, 57344.0, True),
    "bf16": FloatFormat("bf16", 8, 7, 3.3895313892515355e38),
    "fp16": FloatFormat("fp16", 5, 10, 65504.0),
    "fp32": FloatFormat("fp32", 8, 23, float(np.finfo(np.float32).max)),
}


def correction(mantissa_bits: int) -> float:
    """2^-l(m), what stands in for the product of the fractions (section 2)."""
    return float(2.0 ** -(mantissa_bits if mantissa_bits <= 3 else 3 if mantissa_bits == 4 else 4))


def codes(x: ArrayLike, fmt: str) -> NDArray[np.int64]:
    """Encodings (unsigned) of x rounded to a format, ties to even. Raises InputError for integers, unknown formats, and
    NaN or infinity in FP8."""
    form, real = _format(fmt), np.asarray(x)
    if not np.issubdtype(real.dtype, np.floating):
        raise InputError(f"L-Mul takes floating-point tensors, not {real.dtype}.")
    if fmt in ("e4m3", "e5m2"):
        if not np.isfinite(real).all():
            raise InputError(
                f"{fmt} codes of NaN or infinity are not used here: remove {(~np.isfinite(real)).sum()} values."
            )
        flat = np.ascontiguousarray(real, np.float32).reshape(1, -1)
        made = FLOATS[f"fp8_{fmt}"].encode(flat, np.ones(1, np.float32)) if real.size else flat.astype(np.uint8)
        return np.asarray(made.reshape(real.shape), np.int64)
    with np.errstate(over="ignore"):
        if form.name == "fp16":
            return real.astype(np.float16).view(np.uint16).astype(np.int64)
        bits = real.astype(np.float32).view(np.uint32).astype(np.int64)
    if form.name == "fp32":
        return np.asarray(bits)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.asarray(np.where(np.isnan(real), (bits >> 16) | 0x40, rounded))


def values(code: ArrayLike, fmt: str) -> NDArray[np.float64]:
    """What encodings mean."""
    form, number = _format(fmt), np.asarray(code, np.int64)
    m = form.mantissa_bits
    sign = np.where(number >> (form.exponent_bits + m) & 1, -1.0, 1.0)
    exponent, mantissa = (number >> m) & ((1 << form.exponent_bits) - 1), number & ((1 << m) - 1)
    normal = np.ldexp(1.0 + mantissa / (1 << m), (exponent - form.bias).astype(np.int32))
    found = np.where(exponent > 0, normal, np.ldexp(mantissa / (1 << m), 1 - form.bias))
    if not form.saturates:
        special = np.where(mantissa > 0, np.nan, np.inf)
        found = np.where(exponent == (1 << form.exponent_bits) - 1, special, found)
    return np.asarray(sign * found)


def multiply(
    x: ArrayLike, y: ArrayLike, fmt: str = "e4m3", form: Form = "adder", offset: Offset = "paper"
) -> NDArray[np.float64]:
    """Element-wise products of x and y, both rounded to `fmt` first; broadcast.

    `offset`: "paper" for 2^-l(m), "none" for 0 (Mitchell), or a fraction of its own. Results of the adder form are
    numbers of the format, those of the algebraic form are not rounded. Raises InputError as `codes`, UnknownNameError
    for other forms.
    """
    layout = _format(fmt)
    if form not in ("adder", "algebraic"):
        raise UnknownNameError("L-Mul form", form, ("adder", "algebraic"))
    share = _share(offset, layout.mantissa_bits)
    left, right = np.broadcast_arrays(codes(x, fmt), codes(y, fmt))
    m, width = layout.mantissa_bits, layout.exponent_bits + layout.mantissa_bits
    mask = (1 << width) - 1
    a, b = left & mask, right & mask
    sign = np.where((left ^ right) >> width & 1, -1.0, 1.0)
    lowest = 1 << m
    infinite = ((1 << layout.exponent_bits) - 1) << m
    highest = int(codes(np.float32(layout.largest), fmt))
    zero = (a < lowest) | (b < lowest)
    if form == "adder":
        total = a + b - (layout.bias << m) + round(share * (1 << m))
        zero |= total < lowest
        top = highest if layout.saturates else infinite
        found = values(np.where(zero, 0, np.clip(total, 0, np.where(total > highest, top, highest))), fmt)
    else:
        fraction = 1 + (a & (lowest - 1)) / lowest + (b & (lowest - 1)) / lowest + share
        exponent = (a >> m) + (b >> m) - 2 * layout.bias
        with np.errstate(over="ignore"):
            found = np.ldexp(fraction, exponent.astype(np.int32))
        zero |= found < 2.0 ** (1 - layout.bias)
        limit = layout.largest if layout.saturates else np.inf
        found = np.where(zero, 0.0, np.where(found > layout.largest, limit, found))
    if not layout.saturates:
        special = (a >= infinite) | (b >= infinite)
        nan = (a > infinite) | (b > infinite) | (special & ((a < lowest) | (b < lowest)))
        found = np.where(nan, np.nan, np.where(special, np.inf, found))
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
    if not np.isfinite(real).all():
        raise InputError(f"L-Mul products of NaN or infinity: the tensor holds {int((~np.isfinite(real)).sum())}.")
    bits = np.ascontiguousarray(real, np.float32).view(np.uint32)
    drop = 23 - mantissa_bits
    if drop:
        bits = (bits + np.uint32((1 << (drop - 1)) - 1) + ((bits >> np.uint32(drop)) & np.uint32(1))) & np.uint32(
            0xFFFFFFFF ^ ((1 << drop) - 1)
        )
    made = bits.view(np.float32)
    return np.asarray(np.where(np.abs(made) < np.finfo(np.float32).tiny, np.float32(0), made))


def matmul(
    a: ArrayLike, b: ArrayLike, mantissa: int = 4, form: Form = "adder", offset: Offset = "paper", threads: int = 1
) -> Floats:
    """A (m, k) @ B (k, n) with every product an L-Mul of operands rounded to `mantissa` bits: float32 (m, n).

    The adder form sums in float32, k ascending (native code). The algebraic form is linear in each operand but for a
    constant, so it is three ordinary products of X, 2^x_e and Y, 2^y_e: exact but for their float32 sums. Raises
    InputError as `round_mantissa` and for shapes that do not fit.
    """
    left, right = round_mantissa(a, mantissa), round_mantissa(b, mantissa)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise InputError(f"Product of {left.shape} by {right.shape} asked for; expected (m, k) by (k, n).")
    share = _share(offset, mantissa)
    if form == "algebraic":
        left_power, right_power = _powers(left), _powers(right)
        made = left @ right_power + left_power @ right + np.float32(share - 1) * (left_power @ right_power)
        return np.asarray(made, np.float32)
    if form != "adder":
        raise UnknownNameError("L-Mul form", form, ("adder", "algebraic"))
    out = np.empty((left.shape[0], right.shape[1]), np.float32)
    constant = (127 << 23) - round(share * (1 << 23))
    _native.logarithmic_matmul(np.ascontiguousarray(left), np.ascontiguousarray(right), constant, threads, out)
    return out


def _powers(x: Floats) -> Floats:
    """sign * 2^exponent of every number, zero for zero."""
    return np.asarray((x.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32))


@dataclass(frozen=True)
class ErrorReport:
    """Relative errors of single products against products of the unrounded operands: mean of the absolute error, mean
    of the error (bias), largest."""

    mean_absolute: float
    bias: float
    largest: float


def error(
    mantissa: int, data: ArrayLike | Literal["uniform", "normal"] = "uniform",
    form: Form | Literal["product"] = "adder", offset: Offset = "paper", pairs: int = 1_000_000, seed: int = 0,
) -> ErrorReport:  # fmt: skip
    """Error of products of random pairs: uniform in [1, 2), normal, or pairs of `data`'s values.

    `form` "product" is the exact product rounded to the same mantissa, the peer. Raises InputError as
    `round_mantissa`.
    """
    rng = np.random.default_rng(seed)
    if isinstance(data, str):
        x, y = rng.uniform(1, 2, (2, pairs)) if data == "uniform" else rng.normal(size=(2, pairs))
    else:
        pool = np.asarray(data, np.float64).reshape(-1)
        pool = pool[pool != 0]
        x, y = rng.choice(pool, (2, pairs))
    x, y = x.astype(np.float32), y.astype(np.float32)
    left, right = round_mantissa(x, mantissa), round_mantissa(y, mantissa)
    exact = x.astype(np.float64) * y
    if form == "product":
        found = round_mantissa((left.astype(np.float64) * right).astype(np.float32), mantissa).astype(np.float64)
    else:
        found = multiply(left, right, "fp32", form, _share(offset, mantissa))
    relative = found / exact - 1
    return ErrorReport(float(np.abs(relative).mean()), float(relative.mean()), float(np.abs(relative).max()))


def best_offset(data: ArrayLike, mantissa: int, candidates: int = 33) -> float:
    """The constant of least squared relative error for products of pairs of `data`'s values, 0 to 1/4."""
    found = {}
    for share in np.linspace(0, 0.25, candidates):
        report = error(mantissa, data, offset=float(share), pairs=100_000)
        found[float(share)] = report.mean_absolute
    return min(found, key=lambda share: found[share])


# Energies per operation, J, 45 nm (M. Horowitz, ISSCC 2014).
HOROWITZ_45NM: Mapping[str, float] = {
    "add int8": 0.03e-12, "add int32": 0.1e-12, "add fp16": 0.4e-12, "add fp32": 0.9e-12,
    "multiply int8": 0.2e-12, "multiply int32": 3.1e-12, "multiply fp16": 1.1e-12, "multiply fp32": 3.7e-12,
}  # fmt: skip


def energy_saving(accumulate: bool, memory_j_per_bit: float = 0.0, weight_bits: int = 32, reuse: int = 1) -> float:
    """Share of energy saved when an fp32 multiplication becomes an int32 addition, 45 nm table of the paper.

    With `accumulate` the fp32 addition of a multiply-accumulate is counted on both sides; `memory_j_per_bit` adds the
    reading of a weight, used `reuse` times. Raises InputError for negative energies and reuse below 1.
    """
    if memory_j_per_bit < 0 or reuse < 1:
        raise InputError(f"Energies are not negative and reuse is at least 1; got {memory_j_per_bit}, {reuse}.")
    both = (HOROWITZ_45NM["add fp32"] if accumulate else 0.0) + memory_j_per_bit * weight_bits / reuse
    return 1 - (HOROWITZ_45NM["add int32"] + both) / (HOROWITZ_45NM["multiply fp32"] + both)


def _share(offset: Offset, mantissa: int) -> float:
    if offset == "paper":
        return correction(mantissa)
    if offset == "none":
        return 0.0
    if not isinstance(offset, int | float) or not 0 <= offset < 1:
        raise InputError(f"The offset is paper, none or a fraction from 0 to below 1, not {offset!r}.")
    return float(offset)


def _format(fmt: str) -> FloatFormat:
    if fmt not in FORMATS:
        raise UnknownNameError("floating-point format", fmt, FORMATS)
    return FORMATS[fmt]


def expected_error(bits: int = 12, share: float = 0.0625) -> dict[str, Any]:
    """Analytic mean absolute and mean relative error for fractions uniform in [0, 1) and no rounding of operands, by
    midpoint quadrature over 2^bits squared points: (adder, algebraic)."""
    points = (np.arange(1 << bits) + 0.5) / (1 << bits)
    x, y = points[:, None], points[None, :]
    total, exact = x + y + share, (1 + x) * (1 + y)
    found = {"adder": np.where(total < 1, 1 + total, 2 * total) / exact - 1, "algebraic": (1 + total) / exact - 1}
    return {name: (float(np.abs(each).mean()), float(each.mean())) for name, each in found.items()}
