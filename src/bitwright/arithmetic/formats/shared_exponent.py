"""Blocks of elements that share an 8-bit power of two: block floating point and the OCP microscaling formats.

"bfp12_32": p = 4 bit integers in blocks of 32, "BFP(p+8)_n" (arXiv 2403.20137); "mxfp8_e4m3", "mxfp8_e5m2",
"mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8": blocks of 32 (OCP Microscaling Formats 1.0, section 5), another size as
"mxfp4_16". Blocks run along the last axis. With e the exponent of a block's largest magnitude, the shared exponent is
e minus that of the element's largest value: the largest magnitude lands in the element's top binade and values above
its largest number saturate. An integer of p bits counts as 1.f, so its step is 2^(e - p + 2). Exponents keep to the 8
bits: blocks below 2^-127 lose precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic.formats import base, elements
from bitwright.arithmetic.formats.base import Array, Encoded
from bitwright.arithmetic.formats.elements import Element, IntegerElement
from bitwright.core.errors import InputError

_LOW, _HIGH = -127, 127  # E8M0 exponents; 255 is its NaN


@dataclass(frozen=True)
class SharedExponent:
    """`block` elements and one E8M0 exponent. `name` is the one of the family. Raises InputError for an empty block."""

    name: str
    element: Element
    block: int

    def __post_init__(self) -> None:
        base.check_granularity(self.block, self.name)

    @property
    def operand(self) -> str | None:
        """The element's."""
        return self.element.operand

    @property
    def code_bits(self) -> int:
        """Bits of one element."""
        return self.element.bits

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Elements, their padding and 8 bits per block."""
        blocks = base.scale_count(shape, self.block)
        return blocks * (self.block * self.code_bits + 8) / int(np.prod(shape, dtype=np.int64))

    def encode(self, x: Array) -> Encoded:
        """Raises InputError for NaN and infinities."""
        real = base.finite(x, self.name)
        grouped = base.groups_of(real, self.block, self.name)
        rows = grouped.reshape(-1, self.block)
        largest = elements.magnitudes(rows)
        highest = 0 if isinstance(self.element, IntegerElement) else int(np.frexp(self.element.largest)[1]) - 1
        shared = np.clip(np.frexp(largest)[1] - 1 - highest, _LOW, _HIGH).astype(np.int32)
        shared[largest == 0] = _LOW
        step = self._step(shared)
        codes = self.element.encode(rows, step / np.float32(self.element.unit))
        return Encoded(codes.reshape(*real.shape[:-1], -1), step.reshape(grouped.shape[:-1]), None, real.shape)

    @property
    def _step_exponent(self) -> int:
        """Exponent of an element's smallest step beside the shared one: an integer counts as 1.f."""
        if isinstance(self.element, IntegerElement):
            return 2 - self.element.bits
        return int(np.frexp(self.element.unit)[1]) - 1

    def _step(self, shared: NDArray[np.int32]) -> NDArray[np.float32]:
        step: NDArray[np.float32] = np.ldexp(np.float32(1), shared + self._step_exponent).astype(np.float32)
        return step

    def integers(self, codes: NDArray[Any]) -> NDArray[np.int64]:
        """Codes in units of the element's smallest step."""
        return np.asarray(self.element.integers[codes])

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """Through the table of the element."""
        return base.decode_table(self.element.integers, encoded)

    def pack(self, encoded: Encoded) -> NDArray[np.uint8]:
        """Elements, then exponents biased by 127."""
        codes = base.pack_codes(encoded.codes & ((1 << self.code_bits) - 1), self.code_bits)
        shared = np.frexp(encoded.scale)[1].reshape(-1) - 1 - self._step_exponent
        return np.concatenate([codes, (shared - _LOW).astype(np.uint8)])

    def unpack(self, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> Encoded:
        """The inverse of `pack`. Raises InputError for another number of bytes, NaN exponents and codes never made."""
        base.check_packed(packed, shape, self.name)
        blocks = base.scale_count(shape, self.block)
        code_bytes = -(-blocks * self.block * self.code_bits // 8)
        if packed.size != code_bytes + blocks:
            raise InputError(f"{self.name} {shape} is {code_bytes + blocks} bytes, not {packed.size}.")
        stored = base.unpack_codes(packed[:code_bytes], self.code_bits, blocks * self.block)
        codes = self.element.bytes_of(stored)
        elements.check_codes(self.element, codes, self.name)
        if (packed[code_bytes:] == 255).any():
            raise InputError(f"{self.name}: an exponent is NaN (255).")
        shared = packed[code_bytes:].astype(np.int32) + _LOW
        step = self._step(shared).reshape(*shape[:-1], -1)
        return Encoded(codes.astype(np.uint8).reshape(*shape[:-1], -1), step, None, shape)


def block_floating_point(total_bits: int, block: int) -> SharedExponent:
    """BFP(p+8)_n: "bfp12_32" has p = 4. Raises InputError for p outside 2..8."""
    return SharedExponent(f"bfp{total_bits}_{block}", IntegerElement(total_bits - 8), block)


MICROSCALING: dict[str, Element] = {
    "mxfp8_e4m3": elements.FLOATS["fp8_e4m3"], "mxfp8_e5m2": elements.FLOATS["fp8_e5m2"],
    "mxfp6_e2m3": elements.FLOATS["fp6_e2m3"], "mxfp6_e3m2": elements.FLOATS["fp6_e3m2"],
    "mxfp4": elements.FLOATS["fp4_e2m1"], "mxint8": IntegerElement(8),
}  # fmt: skip


def microscaling(family: str, block: int | None = None) -> SharedExponent:
    """An MX format of blocks of 32, or of `block`."""
    name = family if block is None else f"{family}_{block}"
    return SharedExponent(name, MICROSCALING[family], 32 if block is None else block)
