"""Elements with real-valued scales: "int8/row", "int4/32", "fp8_e4m3/tensor", "fp8_e4m3/none".

The scale of a tensor, of a row (everything along the last axis) or of a group is what maps its largest magnitude to the
element's largest value; "none" keeps 1, as networks trained in a format do. Scales are stored as float32, or as float16
(",fp16"), rounded before the codes are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic.formats import base, elements
from bitwright.arithmetic.formats.base import Array, Encoded, Granularity
from bitwright.arithmetic.formats.elements import BipolarElement, Element
from bitwright.core.errors import InputError


@dataclass(frozen=True)
class Scaled:
    """An element with one scale per `granularity`. Raises InputError for scales of other than 16 or 32 bits."""

    element: Element
    granularity: Granularity = "row"
    scale_bits: int = 32

    def __post_init__(self) -> None:
        if self.scale_bits not in (16, 32):
            raise InputError(f"Scales are stored in 16 or 32 bits, not {self.scale_bits}.")
        base.check_granularity(self.granularity, self.element.name)

    @property
    def name(self) -> str:
        """For example "int4/32"."""
        return f"{self.element.name}/{self.granularity}" + (",fp16" if self.scale_bits == 16 else "")

    @property
    def operand(self) -> str | None:
        """The element's."""
        return self.element.operand

    @property
    def products(self) -> NDArray[np.int64] | None:
        """Products of all pairs of codes where they are not those of `integers`, as `base.matmul` takes them."""
        return getattr(self.element, "products", None)

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.element.bits

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Codes, their padding and the scales."""
        stored = base.padded_size(shape, self.granularity) * self.code_bits
        stored += base.scale_count(shape, self.granularity) * self.scale_bits
        return stored / int(np.prod(shape, dtype=np.int64))

    def encode(self, x: Array) -> Encoded:
        """Raises InputError for NaN and infinities, and float16 scales that would be infinite."""
        real = base.finite(x, self.name)
        grouped = base.groups_of(real, self.granularity, self.name)
        rows = grouped.reshape(-1, grouped.shape[-1])
        empty: NDArray[np.bool_] = np.zeros(len(rows), np.bool_)
        if self.granularity == "none":
            scale = np.ones(1, np.float32)
        else:
            kept = np.float16 if self.scale_bits == 16 else np.float32
            scale = self.element.scales(rows)
            if isinstance(self.element, BipolarElement):  # has no zero: rows of zeros are kept by a scale of 0
                empty = np.asarray(~rows.any(axis=1))
            tiny = np.float32(max(np.finfo(kept).tiny, np.finfo(np.float32).tiny / self.element.unit))
            with np.errstate(over="ignore"):
                scale = np.where(scale == 0, np.float32(1), np.maximum(scale, tiny)).astype(kept).astype(np.float32)
            if not np.isfinite(scale).all():
                raise InputError("A scale leaves the range of float16; store float32 scales.")
        codes = self.element.encode(rows, scale)
        scale = np.where(empty, np.float32(0), scale * np.float32(self.element.unit))
        single = self.granularity in ("tensor", "none")
        shape = real.shape if single else (*real.shape[:-1], -1)
        return Encoded(codes.reshape(shape), scale.reshape(()) if single else scale.reshape(grouped.shape[:-1]), None,
                       real.shape)  # fmt: skip

    def integers(self, codes: NDArray[Any]) -> NDArray[np.int64]:
        """Codes in units of the element's smallest step."""
        return np.asarray(self.element.integers[codes])

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """Through the table of the element."""
        return base.decode_table(self.element.integers, encoded)

    def pack(self, encoded: Encoded) -> NDArray[np.uint8]:
        """Codes, then scales (the scale itself, without the element's unit)."""
        kept = np.float16 if self.scale_bits == 16 else np.float32
        codes = base.pack_codes(encoded.codes & ((1 << self.code_bits) - 1), self.code_bits)
        if self.granularity == "none":
            return codes
        scale = (encoded.scale / np.float32(self.element.unit)).astype(kept).reshape(-1)
        return np.concatenate([codes, scale.view(np.uint8)])

    def unpack(self, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> Encoded:
        """The inverse of `pack`. Raises InputError for another number of bytes and codes that are never made."""
        base.check_packed(packed, shape, self.name)
        count, scales = base.padded_size(shape, self.granularity), base.scale_count(shape, self.granularity)
        code_bytes = -(-count * self.code_bits // 8)
        if packed.size != code_bytes + scales * self.scale_bits // 8:
            raise InputError(
                f"{self.name} {shape} is {code_bytes + scales * self.scale_bits // 8} bytes, not {packed.size}."
            )
        stored = base.unpack_codes(packed[:code_bytes], self.code_bits, count)
        codes = self.element.bytes_of(stored)
        elements.check_codes(self.element, codes, self.name)
        kept = np.float16 if self.scale_bits == 16 else np.float32
        scale = np.ones(1, np.float32)
        if scales:
            scale = np.frombuffer(packed[code_bytes:].tobytes(), kept).astype(np.float32)
            base.check_scales(scale, self.name)
        scale = scale * np.float32(self.element.unit)
        single = self.granularity in ("tensor", "none")
        rows = max(1, int(np.prod(shape[:-1], dtype=np.int64)))
        return Encoded(codes.astype(np.uint8).reshape(*shape[:-1], -1), scale.reshape(()) if single else
                       scale.reshape(*shape[:-1], scales // rows), None, shape)  # fmt: skip
