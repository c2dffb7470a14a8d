"""Hardware of the digit encodings: encoders, multiples of the other operand, and the sparse encoder.

Every function adds combinational logic to an Amaranth `Module`, outside of any `If` or `Switch`. Words are read as
two's complement. A digit travels as a code, lowest bit first:

| radix | bits | meaning |
|---|---|---|
| 4 | one, two, negative | magnitude of the digit is 1; is 2; the digit is negative |
| 2 | one, negative | magnitude of the digit is 1; the digit is negative |

`negative` is arbitrary where the digit is zero. Digits that are never zero (a sparse encoder left the others out) fit
into a select of two bits: 00 = -2b, 01 = b, 10 = 2b, 11 = -b.

Sources: arXiv 2503.06342 (encoders, sparse encoding, select); arXiv 2404.11887 (EN-T). The logic of EN-T here needs no
magnitude, see `_ent_slices`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError

_MAX_BITS = 16
_MAX_FLAGS = 8
_shared: WeakKeyDictionary[Module, dict[tuple[str, int], tuple[Any, list[Any]]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class DigitCode:
    """The bits of one digit's code: `one` and `two` exclude each other, `negative` counts only when one of them is 1.

    `two` is a constant 0 in radix 2.
    """

    one: Any
    two: Any
    negative: Any

    @classmethod
    def of(cls, encoding: str, code: Any) -> DigitCode:
        """The bits of `code`. Raises InputError for a code of another width than the encoding's."""
        bits = code_bits(encoding)
        if len(code) != bits:
            raise InputError(f"A digit of encoding {encoding!r} has a code of {bits} bits, not {len(code)}.")
        return cls(code[0], code[1] if bits == 3 else Const(0, 1), code[bits - 1])


@dataclass(frozen=True)
class SparseEncoder:
    """Which flags are set: their `count`, and `position[j]` of the j-th of them, arbitrary from j = count on."""

    count: Any
    position: tuple[Any, ...]


@dataclass(frozen=True)
class InvertedMultiple:
    """A multiple as `word` (signed) plus `increment` (one bit): negative multiples are inverted, the 1 is still to add.

    It needs no -b, and the increment costs nothing where carry words are formed: the lowest bit of every carry word
    is vacant, and a tree of n words has n - 2 of them.
    """

    word: Any
    increment: Any

    def shifted(self, places: int) -> InvertedMultiple:
        """The multiple times 2^places; the vacated bits are filled so that the increment stays at weight 1."""
        if not places:
            return self
        return InvertedMultiple(Cat(self.increment.replicate(places), self.word).as_signed(), self.increment)


def code_bits(encoding: str) -> int:
    """Bits of one digit's code: 3 in radix 4, 2 in radix 2. Raises UnknownNameError for an unknown encoding."""
    return 3 if encodings.get(encoding).radix == 4 else 2


def encode_digits(module: Module, encoding: str, word: Any, name: str = "d") -> list[Any]:
    """The codes of all digits of `word` (2 to 16 bits), lowest weight first, as signals `<name>_<weight>`.

    Raises UnknownNameError for an unknown encoding, InputError for a width it cannot split.
    """
    _check_word(encoding, word)
    codes = []
    for weight, bits in enumerate(_DIGITS[encoding](module, word, name)):
        codes.append(_signal(module, code_bits(encoding), f"{name}_{weight}", Cat(*bits)))
    return codes


def encode_digit(module: Module, encoding: str, word: Any, weight: int, name: str) -> Any:
    """The code of one digit of `word` as the signal `name`.

    Modified Booth and two's complement look at their own bits only; the chain of the other encodings is built once
    for each word of a module. Raises as `encode_digits`, and InputError for a weight the word does not have.
    """
    count = _check_word(encoding, word)
    if not 0 <= weight < count:
        raise InputError(f"Encoding {encoding!r} of {len(word)} bits has digits 0 to {count - 1}, not {weight}.")
    if encoding in _STATELESS:
        bits = _DIGITS[encoding](module, word, name)[weight]
        return _signal(module, code_bits(encoding), name, Cat(*bits))
    chains = _shared.setdefault(module, {})
    if (encoding, id(word)) not in chains:  # the entry keeps the word, so that its id stays its own
        codes = encode_digits(module, encoding, word, f"{getattr(word, 'name', 'word')}_digit")
        chains[encoding, id(word)] = word, codes
    return _signal(module, code_bits(encoding), name, chains[encoding, id(word)][1][weight])


def negate(module: Module, b: Any, name: str = "minus_b") -> Any:
    """-b, one bit wider than `b` (so that the most negative value fits), without an adder.

    Every bit above the lowest one that is set is inverted: a chain of ORs instead of a carry chain.
    """
    count = len(b)
    below = Signal(count, name=f"{name}_any_below")  # bit i: some bit of b up to i is one
    module.d.comb += below.eq(Cat(b[0], *(below[index - 1] | b[index] for index in range(1, count))))
    return _signal(module, signed(count + 1), name, Cat(b, b[-1]) ^ Cat(0, below))


def select_multiple(module: Module, encoding: str, code: Any, b: Any, minus_b: Any, bits: int, name: str) -> Any:
    """The partial product digit * b in `bits` bits, from `b`, `negate(b)` and the digit's code.

    Radix 4 needs two bits more than `b`, radix 2 one; raises InputError for fewer, or for words that do not match.
    """
    digit = DigitCode.of(encoding, code)
    radix4 = len(code) == 3
    _check_multiple(b, minus_b, bits, 2 if radix4 else 1)
    base = _signal(module, signed(len(minus_b)), f"{name}_base", Mux(digit.negative, minus_b, b.as_signed()))
    if not radix4:
        return _signal(module, signed(bits), name, (Cat(base) & digit.one.replicate(len(base))).as_signed())
    wide = len(base) + 1
    once = Cat(base, base[-1]) & digit.one.replicate(wide)
    twice = Cat(0, base) & digit.two.replicate(wide)
    return _signal(module, signed(bits), name, (once | twice).as_signed())


def nonzero(code: Any, encoding: str) -> Any:
    """1 when the digit is not zero."""
    digit = DigitCode.of(encoding, code)
    return digit.one | digit.two if len(code) == 3 else digit.one


def select_code(module: Module, encoding: str, code: Any, name: str) -> Any:
    """The select of two bits (00 = -2b, 01 = b, 10 = 2b, 11 = -b) of a digit that is not zero."""
    digit = DigitCode.of(encoding, code)
    # The upper bit tells 2b from -2b when the lower is 0, -b from b when it is 1. In radix 2 the lower is always 1.
    bits = (digit.one, ~(digit.one ^ digit.negative)) if len(code) == 3 else (Const(1, 1), digit.negative)
    return _signal(module, 2, name, Cat(*bits))


def select_issued_multiple(module: Module, select: Any, b: Any, minus_b: Any, bits: int, name: str) -> Any:
    """The partial product of a digit that is not zero, in `bits` bits, from its select of two bits.

    Raises InputError for fewer than two bits more than `b`, or for words that do not match.
    """
    if len(select) != 2:
        raise InputError(f"The select of an issued digit has 2 bits, not {len(select)}.")
    _check_multiple(b, minus_b, bits, 2)
    negative = ~(select[0] ^ select[1])
    base = _signal(module, signed(len(minus_b)), f"{name}_base", Mux(negative, minus_b, b.as_signed()))
    multiple = Mux(select[0], Cat(base, base[-1]), Cat(0, base))
    return _signal(module, signed(bits), name, multiple.as_signed())


def select_inverted(module: Module, encoding: str, code: Any, b: Any, bits: int, name: str) -> InvertedMultiple:
    """The partial product digit * b without -b: a word of `bits` bits and an increment (0 or 1) to add to it.

    Exact also for digit 0, whose code may be negative. Raises InputError as `select_multiple`.
    """
    digit = DigitCode.of(encoding, code)
    if len(code) == 3:
        _check_bits(b, bits, 2)
        once, twice = Cat(b, b[-1], b[-1]), Cat(0, b, b[-1])
        magnitude = (once & digit.one.replicate(len(once))) | (twice & digit.two.replicate(len(once)))
    else:
        _check_bits(b, bits, 1)
        magnitude = Cat(b, b[-1]) & digit.one.replicate(len(b) + 1)
    word = (magnitude ^ digit.negative.replicate(len(magnitude))).as_signed()
    return InvertedMultiple(_signal(module, signed(bits), name, word), digit.negative)


def select_issued_inverted(module: Module, select: Any, b: Any, bits: int, name: str) -> InvertedMultiple:
    """As `select_inverted`, for a digit that is not zero and its select of two bits."""
    if len(select) != 2:
        raise InputError(f"The select of an issued digit has 2 bits, not {len(select)}.")
    _check_bits(b, bits, 2)
    negative = _signal(module, 1, f"{name}_increment", ~(select[0] ^ select[1]))
    magnitude = Mux(select[0], Cat(b, b[-1], b[-1]), Cat(0, b, b[-1]))
    word = (magnitude ^ negative.replicate(len(b) + 2)).as_signed()
    return InvertedMultiple(_signal(module, signed(bits), name, word), negative)


def sparse_encoder(module: Module, flags: Sequence[Any], name: str) -> SparseEncoder:
    """Count and positions of the set flags among 2 to 8; signals `<name>_count` and `<name>_position_<j>`.

    Source: arXiv 2503.06342, sparse encoding. With "at least j of the first k flags are set" for all j and k, the
    positions are thermometer codes: the j-th set flag is behind as many flags as there are k that have not reached j.
    Raises InputError for another number of flags.
    """
    total = len(flags)
    if not 2 <= total <= _MAX_FLAGS:
        raise InputError(f"Sparse encoder {name!r} takes 2 to {_MAX_FLAGS} flags, not {total}.")
    one, zero = Const(1, 1), Const(0, 1)
    reached: list[list[Any]] = [[one] + [zero] * total]  # reached[k][j]: at least j of the first k flags
    for k, flag in enumerate(flags):
        row: list[Any] = [one]
        for j in range(1, total + 1):
            if j > k + 1:
                row.append(zero)
                continue
            more = flag & reached[k][j - 1] if j > 1 else flag
            word = more | reached[k][j] if j <= k else more
            row.append(_signal(module, 1, f"{name}_{j}_of_{k + 1}", word))
        reached.append(row)
    count_bits = _thermometer(reached[total][1:])
    count_bits[0] = _parity(flags)
    count = _signal(module, total.bit_length(), f"{name}_count", Cat(*count_bits))
    positions = []
    for j in range(1, total + 1):
        behind = [one if k < j else ~reached[k][j] for k in range(1, total)]
        bits = Cat(*_thermometer(behind))
        positions.append(_signal(module, (total - 1).bit_length(), f"{name}_position_{j - 1}", bits))
    return SparseEncoder(count, tuple(positions))


def encode_stored(module: Module, word: Any, name: str = "stored") -> Any:
    """EN-T digits of `word` (n bits) as n + 1 bits: the digits modulo 4, two bits each, then the sign of the word.

    The sign tells digit 2 (words from zero up) from digit -2 (negative words); 3 is the digit -1 in both.
    Source: arXiv 2404.11887, where the digits of the magnitude are stored in the same n + 1 bits; this way neither the
    encoder nor the reader has to negate. Raises InputError for odd widths.
    """
    _check_word("ent", word)
    codes: list[Any] = []
    for low, high, carry, _ in _ent_slices(module, word, name):
        codes += [low ^ carry, high ^ (low & carry)]
    return _signal(module, len(word) + 1, name, Cat(*codes, word[-1]))


def stored_digit(module: Module, stored: Any, weight: int, name: str = "") -> Any:
    """The code (one, two, negative) of one digit of a word stored by `encode_stored`; `stored_<weight>` if not named.

    Raises InputError for a weight the word does not have.
    """
    count = (len(stored) - 1) // 2
    if len(stored) % 2 == 0 or not 0 <= weight < count:
        raise InputError(f"A stored EN-T word of {len(stored)} bits has no digit {weight}; it has {count} digits.")
    low, high, sign = stored[2 * weight], stored[2 * weight + 1], stored[-1]
    return _signal(module, 3, name or f"stored_{weight}", Cat(low, high & ~low, high & (low | sign)))


def flip_top_bit(word: Any) -> Any:
    """`word` with its top bit inverted, read as unsigned: value + 2^(bits - 1). Partial products so need no sign."""
    return Cat(word[:-1], ~word[-1])


def _mbe(module: Module, word: Any, name: str) -> list[tuple[Any, ...]]:
    padded = Cat(0, word)
    digits = []
    for place in range(0, len(word), 2):
        low, middle, high = padded[place], padded[place + 1], padded[place + 2]
        one = middle ^ low
        digits.append((one, ~one & (high ^ middle), high))
    return digits


def _ent(module: Module, word: Any, name: str) -> list[tuple[Any, ...]]:
    digits = []
    for low, high, carry, following in _ent_slices(module, word, name):
        one = low ^ carry
        digits.append((one, ~one & (high ^ carry), following))
    return digits


def _ent_slices(module: Module, word: Any, name: str) -> list[tuple[Any, Any, Any, Any]]:
    """Lower bit, upper bit, carry in and carry out of each slice of two bits.

    The EN-T digits of a word are -1..2 when it is not negative and -2..1 when it is. Both sets hold each residue modulo
    4 once, so the digits follow from the slices of the two's complement word itself, no magnitude needed: slice plus
    carry, which turns into a negative digit with a carry from 3 (not negative) or from 2 (negative) on. The carry out
    of a slice is therefore also the sign of its digit, and that of the top slice is the sign of the word.
    """
    sign = word[-1]
    slices = []
    carry: Any = Const(0, 1)
    for place in range(0, len(word), 2):
        low, high = word[place], word[place + 1]
        if place + 2 == len(word):
            following = sign
        else:
            generate, propagate = high & (low | sign), high | (low & sign)
            following = _signal(module, 1, f"{name}_carry_{place // 2 + 1}", generate | (propagate & carry))
        slices.append((low, high, carry, following))
        carry = following
    return slices


def _canonical_signed_digit(module: Module, word: Any, name: str) -> list[tuple[Any, ...]]:
    # Reitwiesner's recoding: a digit of magnitude 1 is negative when the next bit is one.
    extended = [*(word[index] for index in range(len(word))), word[-1]]
    digits = []
    carry: Any = Const(0, 1)
    for place, (here, above) in enumerate(pairwise(extended)):
        digits.append((here ^ carry, above))
        if place + 1 < len(word):
            majority = (here & above) | (carry & (here | above))
            carry = _signal(module, 1, f"{name}_carry_{place + 1}", majority)
    return digits


def _twos_complement(module: Module, word: Any, name: str) -> list[tuple[Any, ...]]:
    top = len(word) - 1
    return [(word[index], Const(index == top, 1)) for index in range(len(word))]


def _sign_magnitude(module: Module, word: Any, name: str) -> list[tuple[Any, ...]]:
    sign = word[-1]
    digits = [(word[0], sign)]
    invert: Any = Const(0, 1)  # the word is negative and has a one below
    for place in range(1, len(word)):
        invert = _signal(module, 1, f"{name}_invert_{place}", invert | (sign & word[place - 1]))
        digits.append((word[place] ^ invert, sign))
    return digits


_DIGITS: dict[str, Callable[[Module, Any, str], list[tuple[Any, ...]]]] = {
    "mbe": _mbe, "ent": _ent, "csd": _canonical_signed_digit, "twos-complement": _twos_complement,
    "sign-magnitude": _sign_magnitude,
}  # fmt: skip
_STATELESS = ("mbe", "twos-complement")


def _check_word(encoding: str, word: Any) -> int:
    """Number of digits of the word."""
    digits = encodings.get(encoding)
    if len(word) > _MAX_BITS:
        raise InputError(f"Hardware of encoding {encoding!r} takes 2 to {_MAX_BITS} bits, not {len(word)}.")
    return digits.digit_count(len(word))


def _check_multiple(b: Any, minus_b: Any, bits: int, more: int) -> None:
    if len(minus_b) != len(b) + 1:
        raise InputError(f"The negative of a word of {len(b)} bits has {len(b) + 1} bits, not {len(minus_b)}.")
    _check_bits(b, bits, more)


def _check_bits(b: Any, bits: int, more: int) -> None:
    if bits < len(b) + more:
        raise InputError(f"A multiple of {len(b)} bits needs {len(b) + more} bits; {bits} would change its value.")


def _signal(module: Module, shape: Any, name: str, value: Any) -> Any:
    signal = Signal(shape, name=name)
    module.d.comb += signal.eq(value)
    return signal


def _thermometer(steps: Sequence[Any]) -> list[Any]:
    """The number of ones in a thermometer code (lowest step first: ones, then zeros) as binary, lowest bit first."""
    bits = []
    for bit in range(len(steps).bit_length()):
        value: Any = Const(0, 1)
        for start in range(1 << bit, len(steps) + 1, 2 << bit):
            end = start + (1 << bit)
            part = steps[start - 1] & ~steps[end - 1] if end <= len(steps) else steps[start - 1]
            value = value | part
        bits.append(value)
    return bits


def _parity(flags: Sequence[Any]) -> Any:
    odd = flags[0]
    for flag in flags[1:]:
        odd = odd ^ flag
    return odd
