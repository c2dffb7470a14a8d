"""Integers with zero points: "uint4/128" stores 0 .. 2^bits - 1 around an integer zero point per group, row or tensor.

Scales are float32, or float16 with ",fp16"; zero points are as wide as a code. Symmetric integers are in `scaled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.arithmetic.formats import base
from bitwright.arithmetic.formats.base import Array, Encoded, Granularity
from bitwright.core.errors import InputError


@dataclass(frozen=True)
class AsymmetricInteger:
    """Unsigned codes of 2 to 8 bits. Raises InputError for other widths and scales of other than 16 or 32 bits."""

    bits: int = 8
    granularity: Granularity = "row"
    scale_bits: int = 32

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"Integer formats have 2 to 8 bits, not {self.bits}.")
        if self.scale_bits not in (16, 32):
            raise InputError(f"Scales are stored in 16 or 32 bits, not {self.scale_bits}.")
        base.check_granularity(self.granularity, f"uint{self.bits}")
        if self.granularity == "none":
            raise InputError("Zero points need scales: per tensor, row or group, not none.")

    @property
    def name(self) -> str:
        """For example "uint4/128"."""
        return f"uint{self.bits}/{self.granularity}" + (",fp16" if self.scale_bits == 16 else "")

    @property
    def operand(self) -> str | None:
        """Codes of 4 bits are multiplied as they are; zero points come off after the sums."""
        return "uint4" if self.bits == 4 else None

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.bits

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Codes, scales and zero points."""
        stored = base.padded_size(shape, self.granularity) * self.bits
        stored += base.scale_count(shape, self.granularity) * (self.scale_bits + self.bits)
        return stored / int(np.prod(shape, dtype=np.int64))

    def encode(self, x: Array) -> Encoded:
        """The range is [min(x, 0), max(x, 0)]: zero is exact. Raises InputError for NaN and infinities."""
        real = base.finite(x, self.name)
        grouped = base.groups_of(real, self.granularity, self.name)
        kept = np.float16 if self.scale_bits == 16 else np.float32
        levels = (1 << self.bits) - 1
        flat = np.ascontiguousarray(grouped).reshape(-1)
        extremes = np.empty((2, flat.size // grouped.shape[-1]), np.float32)
        _native.group_extremes(flat, *extremes)
        low, high = np.minimum(extremes[0], 0), np.maximum(extremes[1], 0)
        scale = high / np.float32(levels) - low / np.float32(levels)
        tiny = np.float32(np.finfo(kept).tiny)
        with np.errstate(over="ignore"):
            scale = np.where(scale == 0, np.float32(1), np.maximum(scale, tiny)).astype(kept).astype(np.float32)
        if not np.isfinite(scale).all():
            raise InputError("A scale leaves the range of float16; store float32 scales.")
        zero = np.clip(np.rint(-low / scale), 0, levels)
        codes = np.empty(flat.size, np.uint8)
        _native.encode_unsigned(flat, scale, zero, levels, codes)
        scale, zero = scale.reshape(grouped.shape[:-1]), zero.reshape(grouped.shape[:-1]).astype(np.int32)
        if self.granularity == "tensor":
            return Encoded(codes.reshape(real.shape), scale.reshape(()), zero.reshape(()), real.shape)
        return Encoded(codes.reshape(*real.shape[:-1], -1), scale, zero, real.shape)

    def integers(self, codes: NDArray[Any]) -> NDArray[np.int64]:
        """The codes themselves."""
        return codes.astype(np.int64)

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """(code - zero) * scale."""
        assert encoded.zero is not None
        real = np.empty(encoded.codes.size, np.float32)
        zero, scale = (np.ascontiguousarray(each, np.float32).reshape(-1) for each in (encoded.zero, encoded.scale))
        _native.decode_unsigned(np.ascontiguousarray(encoded.codes).reshape(-1), zero, scale, real)
        return base.in_shape(real, encoded)

    def pack(self, encoded: Encoded) -> NDArray[np.uint8]:
        """Codes, then scales, then zero points."""
        kept = np.float16 if self.scale_bits == 16 else np.float32
        assert encoded.zero is not None
        return np.concatenate([
            base.pack_codes(encoded.codes, self.bits), encoded.scale.astype(kept).reshape(-1).view(np.uint8),
            base.pack_codes(encoded.zero, self.bits),
        ])  # fmt: skip

    def unpack(self, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> Encoded:
        """The inverse of `pack`. Raises InputError for another number of bytes."""
        base.check_packed(packed, shape, self.name)
        count, scales = base.padded_size(shape, self.granularity), base.scale_count(shape, self.granularity)
        sizes = [-(-count * self.bits // 8), scales * self.scale_bits // 8, -(-scales * self.bits // 8)]
        if packed.size != sum(sizes):
            raise InputError(f"{self.name} {shape} is {sum(sizes)} bytes, not {packed.size}.")
        parts = np.split(packed, np.cumsum(sizes)[:-1])
        codes = base.unpack_codes(parts[0], self.bits, count).astype(np.uint8).reshape(*shape[:-1], -1)
        rows = max(1, int(np.prod(shape[:-1], dtype=np.int64)))
        of_scales: tuple[int, ...] = () if self.granularity == "tensor" else (*shape[:-1], scales // rows)
        kept = np.float16 if self.scale_bits == 16 else np.float32
        scale = np.frombuffer(parts[1].tobytes(), kept).astype(np.float32).reshape(of_scales)
        base.check_scales(scale, self.name)
        return Encoded(codes, scale, base.unpack_codes(parts[2], self.bits, scales).astype(np.int32).reshape(of_scales),
                       shape)  # fmt: skip
