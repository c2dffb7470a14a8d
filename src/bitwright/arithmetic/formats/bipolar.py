"""Bipolar integers and the lossless way to them from signed integers; as a number format they are "bipolar4/row".

A code x of n bits has bits read as -1 and +1: sum of (2 x_i - 1) 2^i = 2 x - (2^n - 1), all odd integers up to
2^n - 1. A signed integer v of n bits becomes v' = 2 v + 1, whose code is v's two's complement pattern with the top bit
flipped, so a tensor scale * v + zero becomes scale / 2 * v' + (zero - scale / 2): the offset multiplies sums of the
other operand in a product.

Source: arXiv 2409.17870, section on bipolar-INT; arXiv 2508.19087.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.formats.base import Encoded
from bitwright.arithmetic.formats.elements import IntegerElement
from bitwright.arithmetic.formats.integer import AsymmetricInteger
from bitwright.arithmetic.formats.scaled import Scaled
from bitwright.core.errors import InputError

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class BipolarOperand:
    """A tensor (rows, k) as bipolar codes: value = scale * bipolar integer + offset.

    `scale` and `offset`: float64, () or (rows, 1).
    """

    codes: NDArray[np.uint8]
    bits: int
    scale: Reals
    offset: Reals

    @property
    def values(self) -> Reals:
        """What the codes stand for, float64."""
        return np.asarray(self.scale * decode(self.codes, self.bits) + self.offset)


def check_bits(bits: int) -> int:
    """The width. Raises InputError outside 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= 8:
        raise InputError(f"Bipolar integers have 1 to 8 bits, not {bits!r}.")
    return int(bits)


def encode(v: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Codes of odd integers. Raises InputError for even ones and those beyond 2^bits - 1."""
    array, top = np.asarray(v), (1 << check_bits(bits)) - 1
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"Bipolar codes are of odd integers, not of {array.dtype}; round with the format bipolar{bits}."
        )
    wide = array.astype(np.int64)
    bad = (wide % 2 == 0) | (np.abs(wide) > top)
    if bad.any():
        raise InputError(f"{bits}-bit bipolar integers are odd and within +-{top}; got {int(wide[bad].flat[0])}.")
    return np.asarray((wide + top) // 2, np.uint8)


def decode(codes: ArrayLike, bits: int) -> NDArray[np.int64]:
    """Odd integers of codes. Raises InputError for codes that do not fit the width."""
    array, top = np.asarray(codes), (1 << check_bits(bits)) - 1
    if array.size and (int(array.min()) < 0 or int(array.max()) > top):
        raise InputError(f"Codes of {bits} bits are 0 to {top}; got {int(array.min())} to {int(array.max())}.")
    return 2 * array.astype(np.int64) - top


def from_signed(v: ArrayLike, bits: int, scale: ArrayLike, zero: ArrayLike = 0.0) -> BipolarOperand:
    """Signed integers v of `bits` bits, standing for scale * v + zero, without loss. `scale`, `zero`: () or (rows, 1).

    Raises InputError for v out of range.
    """
    array, half = np.asarray(v), 1 << (check_bits(bits) - 1)
    if not np.issubdtype(array.dtype, np.integer) or not array.size or array.min() < -half or array.max() >= half:
        what = f"{array.dtype} {array.shape}" if not array.size else f"{array.min()} to {array.max()} ({array.dtype})"
        raise InputError(f"Signed integers of {bits} bits are {-half} to {half - 1}; got {what}.")
    whole, shift = np.asarray(scale, np.float64), np.asarray(zero, np.float64)
    return BipolarOperand((array + half).astype(np.uint8), bits, whole / 2, shift - whole / 2)


def from_encoded(number_format: Any, encoded: Encoded) -> BipolarOperand:
    """Codes of a format of integers with one scale per row or tensor ("int4/row", "uint4/tensor", "bipolar2/row").

    Raises InputError for formats of other numbers and for scales per group.
    """
    scale, k = encoded.scale.astype(np.float64), encoded.shape[-1]
    if scale.ndim and scale.shape[-1] != 1:
        raise InputError(f"{number_format.name}: one scale per row or tensor asked for, not {scale.shape[-1]} per row.")
    codes, bits = encoded.codes[..., :k], int(number_format.code_bits)
    if isinstance(number_format, AsymmetricInteger):
        assert encoded.zero is not None
        half = 1 << (bits - 1)
        return from_signed(codes.astype(np.int64) - half, bits, scale, scale * (half - encoded.zero.astype(np.float64)))
    if isinstance(number_format, Scaled) and isinstance(number_format.element, IntegerElement):
        return from_signed(number_format.integers(codes), bits, scale)
    if isinstance(number_format, Scaled) and number_format.element.name == f"bipolar{bits}":
        return BipolarOperand(np.ascontiguousarray(codes), bits, scale, np.zeros_like(scale))
    raise InputError(f"{number_format.name} holds no integers that bit planes multiply; take int, uint or bipolar.")
