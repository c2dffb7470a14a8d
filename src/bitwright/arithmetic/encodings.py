"""Digit encodings of integers: a value as a sum of digits times powers of a radix, lowest digit first.

| name | radix | digits | of a `bits`-bit integer |
|---|---|---|---|
| `twos-complement` | 2 | 0, 1; the top digit 0, -1 | `bits` |
| `sign-magnitude` | 2 | -1, 0, 1, all of one sign | `bits` |
| `mbe` | 4 | -2..2: modified Booth | `bits`/2, even widths |
| `ent` | 4 | -1..2 on the magnitude, then the sign on every digit | `bits`/2, even widths |
| `csd` | 2 | -1, 0, 1, no two neighbours non-zero: canonical signed digit | `bits` |

Source: arXiv 2503.06342, section on bit-weight decomposition (modified Booth, EN-T), and arXiv 2404.11887 (EN-T);
canonical signed digit is the non-adjacent form of G. W. Reitwiesner, Binary Arithmetic, 1960.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.core.errors import InputError, UnknownNameError

Digits = NDArray[np.int8]
_MAX_BITS = 32


@dataclass(frozen=True)
class Encoding:
    """A digit system for signed integers of a given width."""

    name: str
    radix: int
    digit_set: tuple[int, ...]
    even_widths: bool
    _split: Callable[[NDArray[np.int64], int], Digits]
    _code_bits: Callable[[int], int]

    def digits(self, values: ArrayLike, bits: int) -> Digits:
        """Digits of signed integers of `bits` bits, int8 of shape (..., `digit_count(bits)`), lowest digit first.

        Raises InputError for a width the encoding cannot split, values that are not integers or out of range.
        """
        return self._split(_integers(values, self._checked(bits), bits), bits)

    def decode(self, digits: ArrayLike) -> NDArray[np.int64]:
        """The integers that digits (..., count), lowest first, stand for."""
        table = np.asarray(digits, np.int64)
        result: NDArray[np.int64] = table @ (np.int64(self.radix) ** np.arange(table.shape[-1], dtype=np.int64))
        return result

    def nonzero_digits(self, values: ArrayLike, bits: int) -> NDArray[np.int64]:
        """Number of non-zero digits of every value: the partial products its multiplication needs."""
        counts: NDArray[np.int64] = np.count_nonzero(self.digits(values, bits), axis=-1)
        return counts

    def digit_count(self, bits: int) -> int:
        """Digits of a `bits`-bit integer."""
        return int(self.digits(np.zeros(1, np.int64), bits).shape[-1])

    def code_bits(self, bits: int) -> int:
        """Bits needed to store the encoded operand of `bits` bits."""
        self._checked(bits)
        return self._code_bits(bits)

    def _checked(self, bits: int) -> str:
        if not 2 <= bits <= _MAX_BITS:
            raise InputError(f"Encoding {self.name!r}: width {bits} is outside 2 to {_MAX_BITS} bits.")
        if self.even_widths and bits % 2:
            raise InputError(f"Encoding {self.name!r} has radix-4 digits and needs an even width, not {bits} bits.")
        return self.name


def _integers(values: ArrayLike, name: str, bits: int) -> NDArray[np.int64]:
    given = np.asarray(values)
    if not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"Encoding {name!r} takes integers, not {given.dtype}; quantise first.")
    integers = given.astype(np.int64)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if integers.size and (integers.min() < low or integers.max() > high):
        raise InputError(
            f"Encoding {name!r}: values from {integers.min()} to {integers.max()} do not fit {bits} bits "
            f"({low} to {high})."
        )
    return integers


def _bits_of(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return values[..., None] >> np.arange(count) & 1


def _twos_complement(values: NDArray[np.int64], bits: int) -> Digits:
    digits = _bits_of(values, bits)
    digits[..., -1] *= -1
    return digits.astype(np.int8)


def _sign_magnitude(values: NDArray[np.int64], bits: int) -> Digits:
    return (_bits_of(np.abs(values), bits) * np.sign(values)[..., None]).astype(np.int8)


def _modified_booth(values: NDArray[np.int64], bits: int) -> Digits:
    # Digit i = -2*x[2i+1] + x[2i] + x[2i-1], with x[-1] = 0.
    padded = _bits_of(values << 1, bits + 1)
    return (padded[..., 0:-1:2] + padded[..., 1::2] - 2 * padded[..., 2::2]).astype(np.int8)


def _ent(values: NDArray[np.int64], bits: int) -> Digits:
    magnitude = np.abs(values)
    digits = np.empty((*values.shape, bits // 2), np.int8)
    carry = np.zeros_like(magnitude)
    for place in range(bits // 2):
        total = (magnitude >> 2 * place & 3) + carry
        last = place == bits // 2 - 1
        # 3 becomes -1 with a carry, 4 becomes 0 with a carry; the top digit of a magnitude never exceeds 2.
        carry = (total >= 3).astype(np.int64) * (not last)
        digits[..., place] = total - 4 * carry
    return (digits * np.sign(values)[..., None]).astype(np.int8)


def _canonical_signed_digit(values: NDArray[np.int64], bits: int) -> Digits:
    # Reitwiesner: with h = 3x, the digits of x are the bits of h that differ from those of x, signed.
    triple = 3 * values
    plus, minus = triple & ~values, values & ~triple
    return ((plus[..., None] >> np.arange(1, bits + 1) & 1) - (minus[..., None] >> np.arange(1, bits + 1) & 1)).astype(
        np.int8
    )


_ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        Encoding("twos-complement", 2, (-1, 0, 1), False, _twos_complement, lambda bits: bits),
        Encoding("sign-magnitude", 2, (-1, 0, 1), False, _sign_magnitude, lambda bits: bits + 1),
        Encoding("mbe", 4, (-2, -1, 0, 1, 2), True, _modified_booth, lambda bits: 3 * bits // 2),
        Encoding("ent", 4, (-2, -1, 0, 1, 2), True, _ent, lambda bits: bits + 1),
        Encoding("csd", 2, (-1, 0, 1), False, _canonical_signed_digit, lambda bits: 2 * bits),
    )
}


@cache
def get(name: str) -> Encoding:
    """An encoding by name. Raises UnknownNameError, which lists the names."""
    if name not in _ENCODINGS:
        raise UnknownNameError("digit encoding", name, _ENCODINGS)
    return _ENCODINGS[name]


def names() -> tuple[str, ...]:
    """Names of all encodings."""
    return tuple(_ENCODINGS)
