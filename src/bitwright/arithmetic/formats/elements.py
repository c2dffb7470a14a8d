"""What single codes of at most 8 bits mean: two's complement integers and small floating-point numbers.

An element maps a byte to an integer in units of `unit`: a floating-point code is its significand in units of the
smallest subnormal number. Rounding is to the nearest, ties to even, saturating. Sources: OCP 8-bit Floating Point
Specification (OFP8) 1.0 for E4M3 and E5M2; OCP Microscaling Formats (MX) 1.0, section 5.3, for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.core.errors import InputError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class IntegerElement:
    """Integers of 2 to 8 bits, +-(2^(bits-1) - 1); their bytes are sign-extended. `lowest` adds -2^(bits-1)."""

    bits: int
    lowest: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"Integer elements have 2 to 8 bits, not {self.bits}.")

    @property
    def name(self) -> str:
        """For example int4."""
        return f"int{self.bits}"

    @property
    def largest(self) -> float:
        """Largest value."""
        return float((1 << (self.bits - 1)) - 1)

    unit = 1.0

    @cached_property
    def integers(self) -> NDArray[np.int64]:
        """Value of every byte, (256,); bytes that are no codes have one too."""
        return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)

    @property
    def operand(self) -> str | None:
        """Its name as an operand of hardware products."""
        return self.name

    def scales(self, rows: Floats) -> Floats:
        """What maps the largest magnitude of every row (groups, size) to the largest value, (groups,)."""
        return magnitudes(rows) / np.float32(self.largest)

    def bytes_of(self, codes: NDArray[np.uint16]) -> Bytes:
        """Stored codes of `bits` bits as sign-extended bytes."""
        half = 1 << (self.bits - 1)
        return np.asarray((codes ^ half) - half).astype(np.uint8)

    def encode(self, grouped: Floats, scale: Floats) -> Bytes:
        """Bytes (groups, size) of grouped / scale[:, None]."""
        codes = np.empty(grouped.size, np.uint8)
        flat = np.ascontiguousarray(grouped).reshape(-1)
        _native.encode_integers(flat, np.ascontiguousarray(scale), int(self.largest), codes)
        made = codes.reshape(grouped.shape)
        if self.lowest:
            made[np.rint(grouped / scale[:, None]) <= -self.largest - 1] = np.uint8(256 - (1 << (self.bits - 1)))
        return made


@dataclass(frozen=True)
class FloatElement:
    """Sign, exponent, mantissa, without infinities; codes beyond `largest` are never made.

    `bias`: the stored exponent e > 0 stands for 2^(e - bias); 0 holds the subnormal numbers.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    largest: float

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def unit(self) -> float:
        """The smallest subnormal number."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))

    @cached_property
    def integers(self) -> NDArray[np.int64]:
        """Value of every code in units of `unit`, (256,); codes of NaN and infinities read as finite numbers."""
        codes = np.arange(256) & ((1 << self.bits) - 1)
        magnitude = codes & ((1 << (self.bits - 1)) - 1)
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        significand = np.where(exponent > 0, mantissa + (1 << self.mantissa_bits), mantissa).astype(np.int64)
        value = significand << np.maximum(exponent - 1, 0)
        return np.asarray(np.where(codes >> (self.bits - 1), -value, value), np.int64)

    @property
    def operand(self) -> str | None:
        """Its name as an operand of hardware products; products of E5M2 do not fit 64 bits."""
        return None if self.name == "fp8_e5m2" else self.name

    def scales(self, rows: Floats) -> Floats:
        """What maps the largest magnitude of every row (groups, size) to the largest value, (groups,)."""
        return magnitudes(rows) / np.float32(self.largest)

    def bytes_of(self, codes: NDArray[np.uint16]) -> Bytes:
        """Stored codes as bytes."""
        return codes.astype(np.uint8)

    def encode(self, grouped: Floats, scale: Floats) -> Bytes:
        """Bytes (groups, size) of grouped / scale[:, None]."""
        codes = np.empty(grouped.size, np.uint8)
        _native.encode_floats(
            np.ascontiguousarray(grouped).reshape(-1), np.ascontiguousarray(scale), self.mantissa_bits, self.bias,
            self.largest, self.bits - 1, codes,
        )  # fmt: skip
        return codes.reshape(grouped.shape)


@dataclass(frozen=True)
class BipolarElement:
    """Bits read as +-1: the odd integers from -(2^bits - 1) to 2^bits - 1, code c standing for 2 c - (2^bits - 1).

    No zero, and every bit plane alike. Source: arXiv 2409.17870, bipolar-INT.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InputError(f"Bipolar integers have 1 to 8 bits, not {self.bits}.")

    @property
    def name(self) -> str:
        """For example bipolar4."""
        return f"bipolar{self.bits}"

    @property
    def operand(self) -> str | None:
        """Odd integers of one bit more, which do have a zero for idle cycles."""
        return f"int{self.bits + 1}"

    @property
    def largest(self) -> float:
        """Largest value."""
        return float((1 << self.bits) - 1)

    unit = 1.0

    @cached_property
    def integers(self) -> NDArray[np.int64]:
        """Value of every code, (256,); bytes that are no codes have one too."""
        return 2 * np.arange(256, dtype=np.int64) - ((1 << self.bits) - 1)

    def scales(self, rows: Floats) -> Floats:
        """The scale of least squared error for each row (groups, size): the mean magnitude of one bit, else the best of
        33 from a fifth of what maps the largest magnitude to the largest value up to that."""
        if self.bits == 1:
            return np.asarray(np.abs(rows).mean(axis=1, dtype=np.float64), np.float32)
        most, found = magnitudes(rows) / np.float32(self.largest), np.empty(len(rows), np.float32)
        shares = np.linspace(0.2, 1.0, 33, dtype=np.float32)
        _native.bipolar_scales(np.ascontiguousarray(rows).reshape(-1), most, shares, int(self.largest), found)
        return found

    def bytes_of(self, codes: NDArray[np.uint16]) -> Bytes:
        """Stored codes as bytes."""
        return codes.astype(np.uint8)

    def encode(self, grouped: Floats, scale: Floats) -> Bytes:
        """Bytes (groups, size) of the nearest odd integers to grouped / scale[:, None], ties to the even code."""
        codes = np.empty(grouped.size, np.uint8)
        flat = np.ascontiguousarray(grouped).reshape(-1)
        _native.encode_bipolar(flat, np.ascontiguousarray(scale), int(self.largest), codes)
        return codes.reshape(grouped.shape)


@dataclass(frozen=True)
class PowerOfTwoElement:
    """Zero and signed powers of two: a sign bit, and a code c of the exponent, 0 for zero, else 2^(c - 2^(bits-1) + 1).

    Five bits hold 2^-14 to 1. The logarithm of a magnitude is rounded; below the smallest power it is
    that power, and zero stays zero. Source: arXiv 2306.06446, shift layers (b = 5).
    """

    bits: int

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 6:
            raise InputError(f"Powers of two have 3 to 6 bits, not {self.bits}.")

    @property
    def name(self) -> str:
        """For example shift5."""
        return f"shift{self.bits}"

    @property
    def operand(self) -> str | None:
        """Its name as an operand of hardware products."""
        return f"power{self.bits}"

    @property
    def _lowest(self) -> int:
        return 2 - (1 << (self.bits - 1))

    largest = 1.0

    @property
    def unit(self) -> float:
        """The smallest power."""
        return float(2.0**self._lowest)

    @cached_property
    def integers(self) -> NDArray[np.int64]:
        """Value of every code in units of the smallest power, (256,)."""
        codes = np.arange(256) & ((1 << self.bits) - 1)
        exponent = codes & ((1 << (self.bits - 1)) - 1)
        value = np.where(exponent > 0, np.int64(1) << np.maximum(exponent - 1, 0), 0)
        return np.asarray(np.where(codes >> (self.bits - 1), -value, value), np.int64)

    def scales(self, rows: Floats) -> Floats:
        """What maps the largest magnitude of every row (groups, size) to 1, (groups,)."""
        return magnitudes(rows)

    def bytes_of(self, codes: NDArray[np.uint16]) -> Bytes:
        """Stored codes as bytes."""
        return codes.astype(np.uint8)

    def encode(self, grouped: Floats, scale: Floats) -> Bytes:
        """Bytes (groups, size) of grouped / scale[:, None]."""
        codes = np.empty(grouped.size, np.uint8)
        flat = np.ascontiguousarray(grouped).reshape(-1)
        _native.encode_powers(flat, np.ascontiguousarray(scale), self._lowest, self.bits - 1, codes)
        return codes.reshape(grouped.shape)


Element = IntegerElement | FloatElement | BipolarElement | PowerOfTwoElement
FLOATS = {
    element.name: element
    for element in (
        FloatElement("fp8_e4m3", 4, 3, 7, 448.0),
        FloatElement("fp8_e5m2", 5, 2, 15, 57344.0),
        FloatElement("fp6_e2m3", 2, 3, 1, 7.5),
        FloatElement("fp6_e3m2", 3, 2, 3, 28.0),
        FloatElement("fp4_e2m1", 2, 1, 1, 6.0),
    )
}


def check_codes(element: Element, codes: NDArray[Any], name: str) -> None:
    """Raise InputError for codes the element does not define: NaN, infinities, integers out of range."""
    values = element.integers[codes]
    low = -element.largest - (1 if isinstance(element, IntegerElement) and element.lowest else 0)
    real = values * element.unit
    if values.size and (real.max() > element.largest or real.min() < low):
        raise InputError(f"{name}: codes beyond {element.largest:g}, which the format does not make, are in the data.")


def magnitudes(grouped: Floats) -> Floats:
    """Largest magnitude of every group, (groups,) of (groups, size)."""
    found = np.empty(len(grouped), np.float32)
    _native.group_magnitudes(np.ascontiguousarray(grouped).reshape(-1), found)
    return found


def look_up(element: Element, codes: Bytes, scale: Floats) -> Floats:
    """Values float32 (groups, size) of codes: integer * unit * scale, where `scale` includes the unit already."""
    made = np.empty(codes.size, np.float32)
    table = element.integers.astype(np.float32)
    _native.decode_codes(np.ascontiguousarray(codes).reshape(-1), table, np.ascontiguousarray(scale), made)
    return made.reshape(codes.shape)
