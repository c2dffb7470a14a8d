"""Exact products of number-format codes, as a table and as a circuit: what a multiplier of another format computes.

An operand kind reads a word of a few bits as m * 2^e, m a small signed integer: an integer has e = 0, a floating-point
code its significand and exponent, a power of two m = -1, 0 or 1. A product unit multiplies two of them,
(m_a * m_b) << (e_a + e_b): a fixed-point word in units of 2^`lsb`, in which sums over K are exact. The word 0 always
stands for zero, because idle cycles of an engine bring zeros.

Units are named by their operands, `fp8_e4m3` for a kind times itself, `int8*shift3` for two kinds:

    intN, uint4      two's complement; an unsigned 4-bit integer, as gated shifted copies of the other operand
    fp8_e4m3, fp6_e2m3, fp6_e3m2, fp4_e2m1   OCP codes; the two codes of NaN of E4M3 read as 480 and must not occur
    ovp4             what the decoder of an outlier-victim pair emits (arXiv 2304.07493): 3 bits e, 4 bits m
    shift3           +-2^e, e of 3 bits, as a weight (arXiv 2306.06446); bits 4 and 3: 00 zero, 01 plus, 11 minus
    power3 to power6 codes of the number formats shift3 to shift6: a sign and an exponent code, 0 for zero
    mask             0 or 1, for sums of selected values (arXiv 2306.06446)
    lmul_e4m3        not a product: addition of two E4M3 codes, read as a number again (arXiv 2410.00907, adder form)

FP8 E5M2 is not offered: its exact products need 66 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.formats.elements import FLOATS, FloatElement, PowerOfTwoElement
from bitwright.core.errors import UnknownNameError

Integers = NDArray[np.int64]
Circuit = Callable[[Any, Any, Any], Any]  # (module, word of a, word of b) -> signed product


@dataclass(frozen=True)
class OperandKind:
    """Words of `bits` bits. `integers`: what each of them means in units of 2^`lsb`, (2^bits,). `split`: (module, word)
    -> the hardware values m (signed) and e (unsigned, or None)."""

    name: str
    bits: int
    lsb: int
    integers: Integers
    split: Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class ProductUnit:
    """The product of a word of kind `a` and one of kind `b`; `table` holds it for all words, (2^a_bits, 2^b_bits), in
    units of 2^`lsb`. `circuit` is its hardware, written independently of the table."""

    name: str
    a: OperandKind
    b: OperandKind
    lsb: int
    table: Integers
    circuit: Circuit

    @property
    def a_bits(self) -> int:
        """Bits of a word of A."""
        return self.a.bits

    @property
    def b_bits(self) -> int:
        """Bits of a word of B."""
        return self.b.bits

    @property
    def product_bits(self) -> int:
        """Bits of the signed product."""
        return max(int(self.table.max()).bit_length(), int(-self.table.min() - 1).bit_length()) + 1

    def values(self, a: ArrayLike, b: ArrayLike) -> Integers:
        """Products of words, signed or unsigned readings, broadcast against each other."""
        rows, columns = np.asarray(a) & ((1 << self.a_bits) - 1), np.asarray(b) & ((1 << self.b_bits) - 1)
        return np.asarray(self.table[rows, columns])

    def matmul(self, a: ArrayLike, b: ArrayLike) -> Integers:
        """Sums of products of words (m, k) and (k, n), exact."""
        left, right = np.asarray(a), np.asarray(b)
        total = np.zeros((left.shape[0], right.shape[1]), np.int64)
        for at in range(left.shape[1]):
            total += self.values(left[:, at, None], right[None, at])
        return total


def words_of(kind: OperandKind, codes: ArrayLike) -> Integers:
    """Codes 0 .. 2^bits - 1 as the signed words that engines take."""
    half = 1 << (kind.bits - 1)
    return np.asarray((np.asarray(codes, np.int64) ^ half) - half)


def nearest_words(kind: OperandKind, values: ArrayLike) -> Integers:
    """The signed words of the nearest representable values, `values` in units of 2^lsb."""
    codes = np.arange(1 << kind.bits)
    allowed = codes if kind.name != "fp8_e4m3" else codes[(codes & 0x7F) != 0x7F]
    order = allowed[np.argsort(kind.integers[allowed], kind="stable")]
    sorted_values = kind.integers[order]
    real = np.asarray(values, np.float64)
    right = np.clip(np.searchsorted(sorted_values, real), 1, len(order) - 1)
    left = right - 1
    closer = np.where(real - sorted_values[left] <= sorted_values[right] - real, left, right)
    return words_of(kind, order[closer])


def product_name(a: str | None, b: str | None) -> str | None:
    """The unit that multiplies codes of two formats, by their `operand`; None when there is none."""
    if a is None or b is None:
        return None
    name = a if a == b else f"{b}*{a}" if a == "uint4" else f"{a}*{b}"
    return name if is_product(name) else None


def is_product(name: str) -> bool:
    """Whether `product_unit` knows the name."""
    return (all(part in _kinds() for part in name.split("*")) and name.count("*") < 2) or name == "lmul_e4m3"


@cache
def product_unit(name: str) -> ProductUnit:
    """The unit of that name. Raises UnknownNameError."""
    if not is_product(name):
        raise UnknownNameError("multiplier", name, ("booth", "tool", *_kinds(), "lmul_e4m3", "KIND*KIND"))
    if name == "lmul_e4m3":
        return _logarithmic(FLOATS["fp8_e4m3"])
    first, _, second = name.partition("*")
    a, b = _kinds()[first], _kinds()[second or first]

    def circuit(module: Any, left: Any, right: Any) -> Any:
        if b.name == "uint4":
            return sum(_gated(left, right[place]) << place for place in range(4))
        (m_a, e_a), (m_b, e_b) = a.split(module, left), b.split(module, right)
        product = m_a * m_b
        exponents = [exponent for exponent in (e_a, e_b) if exponent is not None]
        return product << sum(exponents[1:], exponents[0]) if exponents else product

    return ProductUnit(name, a, b, a.lsb + b.lsb, a.integers[:, None] * b.integers[None, :], circuit)


def _gated(word: Any, bit: Any) -> Any:
    from amaranth.hdl import Mux

    return Mux(bit, word, 0)


def _signed_readings(bits: int) -> Integers:
    codes = np.arange(1 << bits)
    half = 1 << (bits - 1)
    return np.asarray((codes ^ half) - half, np.int64)


@cache
def _kinds() -> dict[str, OperandKind]:
    kinds = {f"int{bits}": OperandKind(f"int{bits}", bits, 0, _signed_readings(bits), _split_integer)
             for bits in range(2, 10)}  # fmt: skip
    kinds["uint4"] = OperandKind("uint4", 4, 0, np.arange(16), _split_unsigned)
    kinds["mask"] = OperandKind("mask", 2, 0, np.arange(4) & 1, _split_mask)
    codes = np.arange(32)
    sign = np.array([0, 1, 0, -1])[codes >> 3]  # 10 does not occur and reads as zero
    kinds["shift3"] = OperandKind("shift3", 5, 0, sign << (codes & 7), _split_power)
    for bits in range(3, 7):
        power = PowerOfTwoElement(bits)
        lsb = int(np.log2(power.unit))
        kinds[power.operand or ""] = OperandKind(
            power.operand or "", bits, lsb, power.integers[: 1 << bits], _split_power_code(bits)
        )  # fmt: skip
    codes = np.arange(128)
    kinds["ovp4"] = OperandKind("ovp4", 7, 0, _signed_readings(4)[codes & 15] << (codes >> 4), _split_pair)
    for name in ("fp8_e4m3", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"):
        element = FLOATS[name]
        lsb = 1 - element.bias - element.mantissa_bits
        kinds[name] = OperandKind(
            name, element.bits, lsb, element.integers[: 1 << element.bits], _split_float(element)
        )  # fmt: skip
    return kinds


def _split_integer(module: Any, word: Any) -> tuple[Any, Any]:
    return word.as_signed(), None


def _split_unsigned(module: Any, word: Any) -> tuple[Any, Any]:
    return word.as_unsigned(), None


def _split_mask(module: Any, word: Any) -> tuple[Any, Any]:
    return word[0], None


def _split_power(module: Any, word: Any) -> tuple[Any, Any]:
    from amaranth.hdl import Cat

    return Cat(word[3], word[4] & word[3]).as_signed(), word[:3]


def _split_power_code(bits: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    def split(module: Any, word: Any) -> tuple[Any, Any]:
        from amaranth.hdl import Cat, Mux, Signal, unsigned

        code = word[: bits - 1]
        shift = Signal(unsigned(bits - 1))
        module.d.comb += shift.eq(Mux(code.any(), code - 1, 0))
        return Cat(code.any(), word[bits - 1] & code.any()).as_signed(), shift

    return split


def _split_pair(module: Any, word: Any) -> tuple[Any, Any]:
    return word[:4].as_signed(), word[4:7]


def _split_float(element: FloatElement) -> Callable[[Any, Any], tuple[Any, Any]]:
    def split(module: Any, word: Any) -> tuple[Any, Any]:
        from amaranth.hdl import Cat, Mux, Signal, signed, unsigned

        low = element.mantissa_bits
        exponent = word[low : low + element.exponent_bits]
        normal = exponent.any()
        magnitude = Cat(word[:low], normal)
        significand = Signal(signed(low + 2))
        module.d.comb += significand.eq(Mux(word[element.bits - 1], -magnitude, magnitude))
        shift = Signal(unsigned(element.exponent_bits))
        module.d.comb += shift.eq(Mux(normal, exponent - 1, 0))
        return significand, shift

    return split


def _logarithmic(element: FloatElement) -> ProductUnit:
    """L-Mul, adder form: the magnitudes' codes are added, less the bias and plus 2^(m - l(m)); saturating, subnormal
    operands and results flushed to zero (arXiv 2410.00907, section 2)."""
    from amaranth.hdl import Cat, Mux, Signal, signed, unsigned

    kind = _kinds()[element.name]
    m, bits = element.mantissa_bits, element.bits
    offset = (element.bias << m) - 1  # l(3) = 3: 2^(3 - 3) = 1
    top = int(np.flatnonzero(element.integers[: 1 << (bits - 1)] * element.unit == element.largest)[0])
    codes = np.arange(1 << bits)
    magnitude = codes & ((1 << (bits - 1)) - 1)
    added = magnitude[:, None] + magnitude[None, :] - offset
    flushed = (magnitude[:, None] < 1 << m) | (magnitude[None, :] < 1 << m) | (added < 1 << m)
    found = np.where(flushed, 0, element.integers[np.clip(added, 0, top)])
    sign = (codes[:, None] ^ codes[None, :]) >> (bits - 1)

    def circuit(module: Any, left: Any, right: Any) -> Any:
        total = Signal(signed(bits + 1))
        zero, negative = Signal(), Signal()
        code = Signal(unsigned(bits - 1))
        fields = [word[: bits - 1] for word in (left, right)]
        module.d.comb += [
            total.eq(fields[0] + fields[1] - offset),
            zero.eq(~fields[0][m:].any() | ~fields[1][m:].any() | (total < 1 << m)),
            negative.eq(left[bits - 1] ^ right[bits - 1]),
            code.eq(Mux(zero, 0, Mux(total > top, top, total[: bits - 1]))),
        ]
        significand, shift = kind.split(module, Cat(code, negative))
        return significand << shift

    return ProductUnit(f"lmul_{element.name[4:]}", kind, kind, kind.lsb, np.where(sign == 1, -found, found), circuit)
