"""Attention of one query per head over keys and values packed in block floating point, without unpacking the cache.

Every byte of the cache is read once for all query heads that share it; codes become floats in registers (AVX-512, or a
portable loop elsewhere). Scores, softmax and weighted sums are float32. Source: arXiv 2403.20137 (the cache format).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.threads import thread_count


@dataclass(frozen=True)
class PackedHeads:
    """Keys or values: `codes` (kv_heads, capacity, channels * bits / 8), two 4-bit codes per byte, the first in its low
    half; `exponents` (kv_heads, capacity, blocks) of blocks of consecutive channels, biased by 127; both uint8. A code
    of p bits counts steps of 2^(exponent - p + 2). Raises InputError for other than 4 and 8 bits and unlike shapes."""

    codes: NDArray[np.uint8]
    exponents: NDArray[np.uint8]
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"The attention kernel reads codes of 4 or 8 bits, not {self.bits}.")
        for name, array in (("codes", self.codes), ("exponents", self.exponents)):
            if array.dtype != np.uint8 or array.ndim != 3 or not array.size:
                raise InputError(f"{name} are uint8 (kv_heads, capacity, bytes), not {array.dtype} {array.shape}.")
        if self.codes.shape[:2] != self.exponents.shape[:2]:
            raise InputError(f"Codes {self.codes.shape} and exponents {self.exponents.shape} are of different caches.")
        if self.channels % self.exponents.shape[2] or self.block < 16 or self.block % 16 or self.channels % 32:
            raise InputError(
                f"{self.channels} channels in {self.exponents.shape[2]} blocks: the kernel takes multiples of 32 "
                "channels in blocks of multiples of 16."
            )

    @property
    def channels(self) -> int:
        """Of a head."""
        return int(self.codes.shape[2]) * 8 // self.bits

    @property
    def block(self) -> int:
        """Channels that share an exponent."""
        return self.channels // int(self.exponents.shape[2])


def decode_attention(
    query: NDArray[np.float32], keys: PackedHeads, values: PackedHeads, tokens: int | None = None,
    scale: float | None = None, threads: int | None = None, vectors: bool = True,
) -> NDArray[np.float32]:  # fmt: skip
    """softmax(scale * query . keys) . values over the first `tokens` positions: float32 (heads, channels).

    `query` (heads, channels); consecutive heads share a key-value head. `scale`: 1 / sqrt(channels) by default;
    `vectors=False` takes the portable loop. Raises InputError for shapes that do not fit, and NaN and infinities.
    """
    if query.dtype != np.float32 or query.ndim != 2 or not query.size:
        raise InputError(f"Queries are float32 (heads, channels), not {query.dtype} {query.shape}.")
    count = keys.codes.shape[1] if tokens is None else tokens
    heads = keys.codes.shape[0]
    if keys.bits != values.bits or keys.channels != values.channels or values.codes.shape[0] != heads:
        raise InputError(
            f"Keys of {heads} heads, {keys.channels} channels, {keys.bits} bits and values of {values.codes.shape[0]} "
            f"heads, {values.channels} channels, {values.bits} bits do not belong together."
        )
    if query.shape[1] != keys.channels or query.shape[0] % heads:
        raise InputError(f"Queries {query.shape} do not fit {heads} key-value heads of {keys.channels} channels.")
    if not 1 <= count <= min(keys.codes.shape[1], values.codes.shape[1]):
        raise InputError(f"{count} tokens asked for; the cache holds 1 to {keys.codes.shape[1]}.")
    if not np.isfinite(query).all():
        raise InputError("Queries hold NaN or infinity.")
    out = np.empty(query.shape, np.float32)
    _native.block_floating_attention(
        np.ascontiguousarray(query), np.ascontiguousarray(keys.codes), np.ascontiguousarray(keys.exponents),
        np.ascontiguousarray(values.codes), np.ascontiguousarray(values.exponents), count, keys.bits,
        1 / math.sqrt(keys.channels) if scale is None else scale, vectors, thread_count(threads), out,
    )  # fmt: skip
    return out
