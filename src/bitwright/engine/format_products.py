"""Exact products of number-format codes, as a table and as a circuit: what a multiplier of another format computes.

An operand kind reads a word of a few bits as m * 2^e, m a small signed integer: an integer has e = 0, a floating-point
code its significand and exponent, a power of two m = -1, 0 or 1. A product unit multiplies two of them,
(m_a * m_b) << (e_a + e_b): a fixed-point word in units of 2^`lsb`, in which sums over K are exact. The word 0 always
stands for zero, because idle cycles of an engine bring zeros.

Units are named by their operands, `fp8_e4m3` for a kind times itself, `int8*shift3` for two kinds:

    intN, uint4      two's complement; an unsigned 4-bit integer, as gated shifted copies of the other operand
    fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2, fp4_e2m1   OCP codes; those of NaN and infinities are refused
    ovp4             what the decoder of an outlier-victim pair emits (arXiv 2304.07493): 3 bits e, 4 bits m
    shift3           +-2^e, e of 3 bits, as a weight (arXiv 2306.06446); bits 4 and 3: 00 zero, 01 plus, 11 minus
    power3 to power6 codes of the number formats shift3 to shift6: a sign and an exponent code, 0 for zero
    mask             0 or 1, for sums of selected values (arXiv 2306.06446)
    lmul_e4m3, lmul_e5m2   not products: addition of two FP8 codes, read as a number again (arXiv 2410.00907, adder
                     form)

FP8 E5M2 multiplies other kinds, but not itself: those exact products need 65 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.formats.base import Encoded, NumberFormat
from bitwright.arithmetic.formats.elements import FLOATS, FloatElement, PowerOfTwoElement
from bitwright.arithmetic.formats.logarithmic import LOGARITHMIC, LogarithmicElement
from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs
from bitwright.core.errors import InputError, UnknownNameError

Integers = NDArray[np.int64]
_MOST_BITS = 64
_OUTLIERS = (12, 16, 24, 32, 48, 64, 96)
_CODES = {name: f"fp8{name[4:]}" for name in LOGARITHMIC}  # the kind of word that an L-Mul adder takes
Circuit = Callable[[Any, Any, Any], Any]  # (module, word of a, word of b) -> signed product


@dataclass(frozen=True)
class OperandKind:
    """Words of `bits` bits. `integers`: what each of them means in units of 2^`lsb`, (2^bits,). `split`: (module, word)
    -> the hardware values m (signed) and e (unsigned, or None).

    `undefined`: codes of NaN and infinities, which have no product. `unused`: codes with a value that no encoder makes.
    `sigma`: standard deviation of normal data in units of 2^lsb, where the format says more than its range does.
    """

    name: str
    bits: int
    lsb: int
    integers: Integers
    split: Callable[[Any, Any], tuple[Any, Any]]
    undefined: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    sigma: float | None = None

    @cached_property
    def numbers(self) -> NDArray[np.bool_]:
        """Which codes stand for a number, (2^bits,)."""
        return ~np.isin(np.arange(1 << self.bits), self.undefined)

    @cached_property
    def words(self) -> Integers:
        """The signed words of all numbers, the smallest number first."""
        codes = np.flatnonzero(self.numbers)
        return words_of(self, codes[np.argsort(self.integers[codes], kind="stable")])


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

    @cached_property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest product of numbers."""
        products = self.table[np.ix_(self.a.numbers, self.b.numbers)]
        return int(products.min()), int(products.max())

    @property
    def product_bits(self) -> int:
        """Bits of the signed product."""
        return _signed_bits(*self.range)

    @cached_property
    def _encoded_range(self) -> tuple[int, int]:
        made = [kind.numbers & ~np.isin(np.arange(1 << kind.bits), kind.unused) for kind in (self.a, self.b)]
        products = self.table[np.ix_(*made)]
        return int(products.min()), int(products.max())

    def sum_bits(self, k: int) -> int:
        """Bits of signed sums over `k` products of words that encoders make."""
        low, high = self._encoded_range
        return _signed_bits(k * low, k * high)

    def values(self, a: ArrayLike, b: ArrayLike) -> Integers:
        """Products of words, signed or unsigned readings, broadcast against each other.

        Raises InputError for codes of NaN and infinities.
        """
        codes = []
        for side, kind, words in (("A", self.a, a), ("B", self.b, b)):
            given = np.asarray(words)
            if given.size and (given.min() < -(1 << (kind.bits - 1)) or given.max() >= 1 << kind.bits):
                raise InputError(
                    f"{self.name}: operand {side} has {kind.bits} bits, not {given.min()} to {given.max()}."
                )
            found = given & ((1 << kind.bits) - 1)
            if kind.undefined and not kind.numbers[found].all():
                bad = found[~kind.numbers[found]].flat[0]
                raise InputError(
                    f"{self.name}: operand {side} has the code {int(bad):#04x}, which {kind.name} uses for NaN or "
                    "infinity; encode finite values."
                )
            codes.append(found)
        return np.asarray(self.table[codes[0], codes[1]])

    def matmul(self, a: ArrayLike, b: ArrayLike) -> Integers:
        """Sums of products of words (m, k) and (k, n), exact. Raises InputError for other shapes and for sums that
        could leave int64."""
        left, right = np.asarray(a), np.asarray(b)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise InputError(f"{self.name}: expected words (m, k) and (k, n), not {left.shape} and {right.shape}.")
        if max(-self.range[0], self.range[1]) * left.shape[1] >= 1 << 63:
            raise InputError(f"{self.name}: sums over {left.shape[1]} products could leave int64; split the sum.")
        total = np.zeros((left.shape[0], right.shape[1]), np.int64)
        for at in range(left.shape[1]):
            total += self.values(left[:, at, None], right[None, at])
        return total


def words_of(kind: OperandKind, codes: ArrayLike) -> Integers:
    """Codes 0 .. 2^bits - 1 as the signed words that engines take."""
    half = 1 << (kind.bits - 1)
    return np.asarray((np.asarray(codes, np.int64) ^ half) - half)


def operand_words(form: NumberFormat, encoded: Encoded) -> Integers:
    """The codes of a tensor as the signed words that engines take, padding included: (..., padded k).

    Raises InputError for a format that is no operand of a product.
    """
    if form.operand is None:
        raise InputError(f"{form.name} is no operand of a hardware product.")
    kind = _kinds()[_CODES.get(form.operand, form.operand)]
    if isinstance(form, OutlierVictimPairs):
        return form.operand_words(encoded)
    if kind.name.startswith("int"):
        return form.integers(encoded.codes)
    return words_of(kind, encoded.codes & ((1 << kind.bits) - 1))


def nearest_words(kind: OperandKind, values: ArrayLike) -> Integers:
    """The signed words an encoder makes of the nearest representable values, `values` in units of 2^lsb."""
    codes = np.flatnonzero(kind.numbers & ~np.isin(np.arange(1 << kind.bits), kind.unused))
    grid, first = np.unique(kind.integers[codes], return_index=True)  # of codes with one value, the lowest
    real = np.asarray(values, np.float64)
    right = np.clip(np.searchsorted(grid, real), 1, len(grid) - 1)
    left = right - 1
    closer = np.where(real - grid[left] <= grid[right] - real, left, right)
    return words_of(kind, codes[first[closer]])


def normal_words(kind: OperandKind, rng: np.random.Generator, shape: tuple[int, ...]) -> Integers:
    """Words of normal data in the middle of the range; the largest of 2^20 samples would end it (sigma = half / 4.9)
    unless the kind has a sigma of its own."""
    values = kind.integers[kind.numbers]
    low, high = int(values.min()), int(values.max())
    middle = 0.0 if low < 0 else high / 2
    return nearest_words(kind, rng.normal(middle, kind.sigma or (high - middle) / 4.9, shape))


def product_name(a: str | None, b: str | None) -> str | None:
    """The unit that multiplies codes of two formats, by their `operand`; None when there is none."""
    if a is None or b is None:
        return None
    name = a if a == b else f"{b}*{a}" if a == "uint4" else f"{a}*{b}"
    return name if is_product(name) else None


def is_product(name: str) -> bool:
    """Whether `product_unit` has that unit."""
    return name in LOGARITHMIC or (_known(name) and _product_bits(*_operands(name)) <= _MOST_BITS)


def _known(name: str) -> bool:
    return all(part in _kinds() for part in name.split("*")) and name.count("*") < 2


def _operands(name: str) -> tuple[OperandKind, OperandKind]:
    first, _, second = name.partition("*")
    return _kinds()[first], _kinds()[second or first]


def _product_bits(a: OperandKind, b: OperandKind) -> int:
    """Bits of the largest exact product, in Python's integers."""
    ends = [(int(values.min()), int(values.max())) for values in (a.integers[a.numbers], b.integers[b.numbers])]
    products = [left * right for left in ends[0] for right in ends[1]]
    return _signed_bits(min(products), max(products))


def _signed_bits(low: int, high: int) -> int:
    return max(high.bit_length(), (-low - 1).bit_length()) + 1


@cache
def product_unit(name: str) -> ProductUnit:
    """The unit of that name. Raises UnknownNameError, and InputError for products wider than 64 bits."""
    if name in LOGARITHMIC:
        return _logarithmic(LOGARITHMIC[name])
    if not _known(name):
        raise UnknownNameError("multiplier", name, ("booth", "tool", *_kinds(), *LOGARITHMIC, "KIND*KIND"))
    a, b = _operands(name)
    if not is_product(name):
        raise InputError(
            f"Multiplier {name!r}: exact products of {a.name} and {b.name} need {_product_bits(a, b)} bits, and sums "
            f"have up to {_MOST_BITS}; take a narrower format for one operand, such as fp8_e4m3."
        )

    def circuit(module: Any, left: Any, right: Any) -> Any:
        (m_a, e_a), (m_b, e_b) = a.split(module, left), b.split(module, right)
        gated = b.name == "uint4"
        product = sum(_gated(m_a, right[place]) << place for place in range(4)) if gated else m_a * m_b
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
    kinds["mask"] = OperandKind("mask", 2, 0, np.arange(4) & 1, _split_mask, unused=(2, 3))
    codes = np.arange(32)
    sign = np.array([0, 1, 0, -1])[codes >> 3]  # 10 does not occur and reads as zero
    kinds["shift3"] = OperandKind("shift3", 5, 0, sign << (codes & 7), _split_power, unused=tuple(range(16, 24)))
    for bits in range(3, 7):
        power = PowerOfTwoElement(bits)
        lsb = int(np.log2(power.unit))
        kinds[power.operand or ""] = OperandKind(
            power.operand or "", bits, lsb, power.integers[: 1 << bits], _split_power_code(bits)
        )  # fmt: skip
    codes = np.arange(128)
    pairs = _signed_readings(4)[codes & 15] << (codes >> 4)
    # of pairs with int4 normals: integers to +-7, outliers +-2 and +-3 from 3 << 2 to 3 << 5; 3 sigma ends the normals
    outlier = np.isin(np.abs(_signed_readings(4)[codes & 15]), (2, 3)) & np.isin(np.abs(pairs), _OUTLIERS)
    normal = (codes < 16) & (codes != 8)
    unused = tuple(np.flatnonzero(~(normal | (outlier & (codes >= 32)))).tolist())
    kinds["ovp4"] = OperandKind("ovp4", 7, 0, pairs, _split_pair, unused=unused, sigma=7 / 3)
    for name, element in FLOATS.items():
        lsb = 1 - element.bias - element.mantissa_bits
        integers = element.integers[: 1 << element.bits]
        beyond = tuple(np.flatnonzero(np.abs(integers) * element.unit > element.largest).tolist())
        kinds[name] = OperandKind(name, element.bits, lsb, integers, _split_float(element), beyond)
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


def _logarithmic(element: LogarithmicElement) -> ProductUnit:
    """L-Mul of two FP8 codes, as `arithmetic.formats.logarithmic` defines it."""
    kind = _kinds()[_CODES[element.name]]

    def circuit(module: Any, left: Any, right: Any) -> Any:
        from bitwright.engine.rtl.floating_units import add_encodings

        added_word = add_encodings(
            module, left, right, element.exponent_bits, element.mantissa_bits, True, element.largest_code
        )
        significand, shift = kind.split(module, added_word)
        return significand << shift

    return ProductUnit(element.name, kind, kind, kind.lsb, element.sums, circuit)
