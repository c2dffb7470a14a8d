"""Floating-point arithmetic in hardware: L-Mul, sums, products, dot products of block floating point, FP16 products.

Sums and products are those of IEEE 754 binary32, rounded to nearest, ties to even, with subnormal numbers, infinities
and NaN. The two accumulating units have the input `first`, which starts a new sum, and the sum as output, `latency`
cycles after the inputs; nothing but the addition stands in the loop of the accumulator.

    BlockDotProduct   n products of p-bit integers, their exact sum times 2^(sum of the shared exponents) rounded to
                      binary32 once, then accumulated (arXiv 2403.20137: BFP(p+8)_n, accumulated in fp32 over blocks)
    HalfMultiplyAccumulate   the peer: an FP16 product, exact in binary32, accumulated
"""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.engine.rtl.arithmetic import Component

SINGLE = (8, 23)  # exponent and mantissa bits of binary32
_SHARED_BIAS = 127  # of the exponent that a block shares (E8M0)


def _signal(module: Module, form: Any, expression: Any) -> Any:
    """A signal of that form driven by the expression."""
    word = Signal(form)
    module.d.comb += word.eq(expression)
    return word


def _register(module: Module, form: Any, expression: Any) -> Any:
    """A register of that form that takes the expression in every cycle."""
    word = Signal(form, reset_less=True)
    module.d.sync += word.eq(expression)
    return word


def add_encodings(
    module: Module, a: Any, b: Any, exponent_bits: int, mantissa_bits: int, saturates: bool, largest_code: int,
    checks_range: bool = True,
) -> Any:  # fmt: skip
    """L-Mul, adder form: the word of sign and magnitude code(a) + code(b) - (bias << m) + 2^(m - l(m)).

    Zero and subnormal operands and results below the smallest normal number give zero (with a sign), results above
    `largest_code` that code, or the one after it where the format has infinity. The checks of the range take about as
    long as half a short addition; without `checks_range` only operands are looked at, and sums out of range wrap.
    Source: arXiv 2410.00907, section 2; l(m) = m up to 3 mantissa bits, 3 for 4, 4 above. Raises InputError when the
    codes above the largest one are not a power of two in number.
    """
    m, top = mantissa_bits, exponent_bits + mantissa_bits
    special = (1 << top) - 1 - largest_code
    if special < 1 or special & (special - 1):
        raise InputError(f"L-Mul: the {special} codes above {largest_code:#x} must be a power of two in number.")
    offset = (((1 << (exponent_bits - 1)) - 1) << m) - (1 << (m - (m if m <= 3 else 3 if m == 4 else 4)))
    fields = [word[:top] for word in (a, b)]
    total = _signal(module, signed(top + 2), fields[0] + fields[1] - offset)
    zero = ~fields[0][m:].any() | ~fields[1][m:].any()
    if not checks_range:
        return _signal(module, unsigned(top + 1), Cat(Mux(zero, 0, total[:top])[:top], a[top] ^ b[top]))
    zero = _signal(module, unsigned(1), zero | total[top + 1] | ~total[m : top + 1].any())
    above = _signal(module, unsigned(1), total[top] | total[special.bit_length() - 1 : top].all())
    last = largest_code if saturates else largest_code + 1
    magnitude = Mux(zero, 0, Mux(above, last, total[:top]))
    return _signal(module, unsigned(top + 1), Cat(magnitude[:top], a[top] ^ b[top]))


def _leading_zeros(module: Module, word: Any) -> Any:
    """Zeros above the highest one of a word; its width for zero. A tree of halves."""
    width = len(word)
    size = 1 << (width - 1).bit_length()
    padded = Cat(Const((1 << (size - width)) - 1, size - width), word) if size > width else word

    def count(part: Any) -> Any:
        if len(part) == 1:
            return ~part
        half = len(part) // 2
        high, low = count(part[half:]), count(part[:half])
        bits = half.bit_length()  # a half of 2^k positions counts up to 2^k: k + 1 bits
        empty = high[bits - 1]
        return Mux(empty, Cat(low[: bits - 1], ~low[bits - 1], low[bits - 1]), Cat(high[: bits - 1], 0, 0))

    found = count(padded)
    return _signal(module, unsigned(len(found)), found)


def _shifted_right(module: Module, word: Any, places: Any) -> Any:
    """word >> places, its lowest bit the or of itself and of all that was shifted out (sticky)."""
    for at in range(len(places)):
        distance = min(1 << at, len(word))
        lost = word[:distance].any()
        moved = Cat(word[distance:], Const(0, distance))
        word = _signal(module, unsigned(len(word)), Mux(places[at], Cat(moved[0] | lost, moved[1:]), word))
    return word


def _rounded(module: Module, code: Any, rest: Any) -> Any:
    """Magnitude code plus one where `rest` (guard bit on top, sticky bits below) is above a half, or a half and odd."""
    up = rest[-1] & (rest[:-1].any() | code[0])
    return _signal(module, unsigned(len(code)), code + up)


def add_floats(module: Module, a: Any, b: Any, exponent_bits: int = 8, mantissa_bits: int = 23) -> Any:
    """a + b of words (sign, exponent, mantissa) by the rules of IEEE 754, to nearest, ties to even.

    NaN is the quiet one without a sign. Source: IEEE 754-2019, sections 4.3.1, 6.2 and 6.3.
    """
    m, top = mantissa_bits, exponent_bits + mantissa_bits
    infinity = ((1 << exponent_bits) - 1) << m
    magnitudes = [word[:top] for word in (a, b)]
    swap = _signal(module, unsigned(1), magnitudes[0] < magnitudes[1])
    large = _signal(module, unsigned(top), Mux(swap, magnitudes[1], magnitudes[0]))
    small = _signal(module, unsigned(top), Mux(swap, magnitudes[0], magnitudes[1]))
    sign = _signal(module, unsigned(1), Mux(swap, b[top], a[top]))
    subtract = _signal(module, unsigned(1), a[top] ^ b[top])
    exponents, significands = [], []
    for word in (large, small):
        field = word[m:]
        exponents.append(_signal(module, unsigned(exponent_bits), Mux(field.any(), field, 1)))
        # guard, round and sticky bits below
        significands.append(_signal(module, unsigned(m + 4), Cat(Const(0, 3), word[:m], field.any())))
    distance = _signal(module, unsigned(exponent_bits), exponents[0] - exponents[1])
    aligned = _shifted_right(module, significands[1], distance)
    both = Mux(subtract, significands[0] - aligned, significands[0] + aligned)
    total = _signal(module, unsigned(m + 5), both[: m + 5])
    carry = total[m + 4]
    zeros = _leading_zeros(module, total[: m + 4])
    room = _signal(module, unsigned(exponent_bits), exponents[0] - 1)  # a subnormal result stops here
    left = _signal(module, unsigned(len(zeros)), Mux(zeros > room, room, zeros))
    moved = Mux(carry, Cat(total[0] | total[1], total[2:]), (total[: m + 4] << left)[: m + 4])
    normalised = _signal(module, unsigned(m + 4), moved)
    shifted = _signal(module, unsigned(exponent_bits + 1), Mux(carry, exponents[0] + 1, exponents[0] - left))
    field = _signal(module, unsigned(exponent_bits), Mux(normalised[m + 3], shifted[:exponent_bits], 0))
    code = _rounded(module, Cat(normalised[3 : m + 3], field), normalised[:3])
    beyond = _signal(module, unsigned(1), (shifted >= (1 << exponent_bits) - 1) & normalised[m + 3])
    nan = (large > infinity) | ((small == infinity) & subtract)
    negative = _signal(module, unsigned(1), sign & ~((total == 0) & subtract))
    finite = Mux(beyond, infinity, code)
    magnitude = Mux(nan, infinity | 1 << (m - 1), Mux(large >= infinity, infinity, finite))
    return _signal(module, unsigned(top + 1), Cat(magnitude[:top], negative & ~nan))


def float_of_integer(module: Module, integer: Any, exponent: Any) -> Any:
    """The binary32 word nearest to integer * 2^exponent, ties to even; zero is positive, too large is infinity.

    Raises InputError for integers of more than 24 bits, which would be rounded twice.
    """
    exponent_bits, m = SINGLE
    bits = len(integer)
    if bits > m + 1:
        raise InputError(f"An integer of {bits} bits is not exact in binary32; up to {m + 1} are.")
    negative = integer[bits - 1]
    magnitude = _signal(module, unsigned(bits), Mux(negative, -integer, integer)[:bits])
    zeros = _leading_zeros(module, magnitude)
    aligned = _signal(module, unsigned(m + 1), Cat(Const(0, m + 1 - bits), (magnitude << zeros)[:bits]))
    wide = len(exponent) + 2
    place = _signal(module, signed(wide), exponent + (bits - 1 + 127) - zeros)  # exponent field, unbounded
    below = _signal(module, signed(wide), 1 - place)
    tiny = _signal(module, unsigned(1), below > 0)
    most = m + 3  # further right nothing but the sticky bit is left
    bounded = Mux(below > most, most, below)
    places = _signal(module, unsigned(most.bit_length()), Mux(tiny, bounded[: most.bit_length()], 0))
    moved = _shifted_right(module, Cat(Const(0, 2), aligned), places)
    field = _signal(module, unsigned(exponent_bits), Mux(tiny, 0, place[:exponent_bits]))
    code = _rounded(module, Cat(moved[2 : m + 2], field), moved[:2])
    infinity = ((1 << exponent_bits) - 1) << m
    beyond = ~tiny & (place >= (1 << exponent_bits) - 1)
    found = Mux(integer == 0, 0, Mux(beyond, infinity, code))
    return _signal(module, unsigned(exponent_bits + m + 1), Cat(found[: exponent_bits + m], negative))


def multiply_floats(module: Module, a: Any, b: Any, exponent_bits: int = 8, mantissa_bits: int = 23) -> Any:
    """a * b of words (sign, exponent, mantissa) by the rules of IEEE 754, to nearest, ties to even.

    NaN is the quiet one without a sign. Source: IEEE 754-2019, sections 4.3.1, 6.2 and 6.3.
    """
    m, top = mantissa_bits, exponent_bits + mantissa_bits
    last, bias = (1 << exponent_bits) - 1, (1 << (exponent_bits - 1)) - 1
    infinity = last << m
    magnitudes = [_signal(module, unsigned(top), word[:top]) for word in (a, b)]
    significands = [_signal(module, unsigned(m + 1), Cat(word[:m], word[m:].any())) for word in magnitudes]
    exponents = [Mux(word[m:].any(), word[m:], 1) for word in magnitudes]
    wide = 2 * m + 2
    product = _signal(module, unsigned(wide), significands[0] * significands[1])
    zeros = _leading_zeros(module, product)
    normalised = _signal(module, unsigned(wide), (product << zeros)[:wide])
    place = _signal(module, signed(exponent_bits + 3), exponents[0] + exponents[1] - (bias - 1) - zeros)
    below = _signal(module, signed(exponent_bits + 3), 1 - place)
    tiny = _signal(module, unsigned(1), below > 0)
    most = m + 3  # further right nothing but the sticky bit is left
    bounded = Mux(below > most, most, below)
    places = _signal(module, unsigned(most.bit_length()), Mux(tiny, bounded[: most.bit_length()], 0))
    kept = Cat(normalised[:m].any(), normalised[m : 2 * m + 2])  # significand, guard and sticky bit
    moved = _shifted_right(module, _signal(module, unsigned(m + 3), kept), places)
    field = _signal(module, unsigned(exponent_bits), Mux(tiny, 0, place[:exponent_bits]))
    code = _rounded(module, Cat(moved[2 : m + 2], field), moved[:2])
    beyond = ~tiny & (place >= last)
    zero = ~magnitudes[0].any() | ~magnitudes[1].any()
    special = [word >= infinity for word in magnitudes]
    nan = (magnitudes[0] > infinity) | (magnitudes[1] > infinity) | (zero & (special[0] | special[1]))
    infinite = special[0] | special[1] | (beyond & ~zero)
    magnitude = Mux(nan, infinity | 1 << (m - 1), Mux(infinite, infinity, Mux(zero, 0, code)))
    return _signal(module, unsigned(top + 1), Cat(magnitude[:top], (a[top] ^ b[top]) & ~nan))


def single_of_scaled(module: Module, magnitude: Any, exponent: Any, negative: Any) -> Any:
    """The binary32 word of magnitude * 2^exponent for an unsigned magnitude of up to 24 bits, exact.

    The result must be zero or a normal number; exponents beyond are the caller's. Raises InputError for wider words.
    """
    exponent_bits, m = SINGLE
    bits = len(magnitude)
    if bits > m + 1:
        raise InputError(f"An integer of {bits} bits is not exact in binary32; up to {m + 1} are.")
    zeros = _leading_zeros(module, magnitude)
    aligned = _signal(module, unsigned(bits), (magnitude << zeros)[:bits])
    field = _signal(module, unsigned(exponent_bits), (exponent + (bits - 1 + 127) - zeros)[:exponent_bits])
    found = Mux(magnitude.any(), Cat(Const(0, m + 1 - bits), aligned[: bits - 1], field), 0)
    return _signal(module, unsigned(32), Cat(found[:31], negative))


def single_of_half(module: Module, word: Any, multiplier: Any = None) -> Any:
    """The binary32 word of an FP16 number, subnormal ones, infinities and NaN included, exact.

    With an unsigned 4-bit `multiplier`, of their product: four gated shifted copies of the significand are added. Its
    zero gives zero for infinities and NaN too (arXiv 2411.16158, W4A16).
    """
    normal = word[10:15].any()
    significand = Cat(word[:10], normal)
    if multiplier is not None:
        total = sum(Mux(multiplier[place], significand, 0) << place for place in range(4))
        significand = _signal(module, unsigned(15), total)
    exponent = Mux(normal, word[10:15], 1)
    found = single_of_scaled(module, significand, exponent - 25, word[15])
    special = word[10:15].all() if multiplier is None else word[10:15].all() & multiplier.any()
    passed = Cat(Const(0, 13), word[:10], Const(0xFF, 8), word[15])
    # 31 as an exponent would only matter for infinities and NaN
    return _signal(
        module, unsigned(32), Mux(special, passed, Mux(word[10:15].all(), Cat(Const(0, 31), word[15]), found))
    )


class _Accumulating(Component):
    """Registered inputs, and the binary32 sum of what `addend` makes of them within `stages` further registers."""

    name = "unit"
    stages = 1

    def __init__(self) -> None:
        super().__init__()
        self.add_input("first", unsigned(1))
        self.add_output("sum", unsigned(32), reset_less=True)

    @property
    def latency(self) -> int:
        """Cycles from the inputs to the sum that holds them."""
        return self.stages + 2

    def addend(self, module: Module, words: dict[str, Any]) -> Any:
        """The binary32 word to add, from the registered inputs, `stages - 1` registers later."""
        raise NotImplementedError

    def elaborate(self) -> Module:
        """One addend per cycle."""
        module = Module()
        held = {name: _register(module, word.shape(), word) for name, word in self.inputs.items()}
        total, first = self.outputs["sum"], held["first"]
        for _ in range(self.stages):
            first = _register(module, unsigned(1), first)
        addend = _register(module, unsigned(32), self.addend(module, held))
        module.d.sync += total.eq(add_floats(module, Mux(first, 0, total)[:32], addend))
        return module


class BlockDotProduct(_Accumulating):
    """Inputs `a_0`.. and `b_0`.., p-bit integers; `exponent_a` and `exponent_b`, shared exponents biased by 127, the
    step of a block being 2^(exponent - p + 2). 255 (NaN) must not occur. Raises InputError for other sizes than 2 to 8
    bits and 2 to 256 elements."""

    stages = 2

    def __init__(self, mantissa_bits: int = 4, block: int = 32) -> None:
        if not 2 <= mantissa_bits <= 8 or not 2 <= block <= 256:
            raise InputError(
                f"A block dot product of {block} elements of {mantissa_bits} bits; expected 2 to 256 of 2 to 8 bits."
            )
        super().__init__()
        self.mantissa_bits, self.block = mantissa_bits, block
        for side in ("a", "b"):
            for at in range(block):
                self.add_input(f"{side}_{at}", signed(mantissa_bits))
            self.add_input(f"exponent_{side}", unsigned(8))

    def addend(self, module: Module, words: dict[str, Any]) -> Any:
        """The exact integer dot product, and in the next cycle the binary32 number it stands for."""
        products = [words[f"a_{at}"] * words[f"b_{at}"] for at in range(self.block)]
        largest = self.block << (2 * self.mantissa_bits - 2)
        dot = _register(module, signed(largest.bit_length() + 1), sum(products[1:], products[0]))
        offset = 2 * (_SHARED_BIAS + self.mantissa_bits - 2)
        exponent = _register(module, signed(10), words["exponent_a"] + words["exponent_b"] - offset)
        return float_of_integer(module, dot, exponent)


class HalfMultiplyAccumulate(_Accumulating):
    """Inputs `a` and `b`, FP16 words of normal numbers or zero; subnormal ones count as zero, exponent 31 as a number
    (the cheapest multiplier; its products are exact in binary32)."""

    def __init__(self) -> None:
        super().__init__()
        for side in ("a", "b"):
            self.add_input(side, unsigned(16))

    def addend(self, module: Module, words: dict[str, Any]) -> Any:
        """The 22-bit product of the significands, normalised."""
        a, b = words["a"], words["b"]
        product = _signal(module, unsigned(22), Cat(a[:10], Const(1, 1)) * Cat(b[:10], Const(1, 1)))
        carry = product[21]
        fraction = Mux(carry, product[:21], Cat(Const(0, 1), product[:20]))[:21]
        field = _signal(module, unsigned(8), a[10:15] + b[10:15] + (127 - 30) + carry)
        zero = ~a[10:15].any() | ~b[10:15].any()
        magnitude = Mux(zero, 0, Cat(Const(0, 2), fraction, field))
        return _signal(module, unsigned(32), Cat(magnitude[:31], a[15] ^ b[15]))
