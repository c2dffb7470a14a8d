"""A key-value cache in block floating point: packed codes and shared exponents, written token by token.

Blocks run along the channels of a head, so a token is rounded once, when it enters, and never again. Also for
microscaling formats, which share a power of two in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.elements import IntegerElement
from bitwright.arithmetic.formats.shared_exponent import SharedExponent
from bitwright.core.errors import InputError
from bitwright.kernels.block_floating_attention import PackedHeads
from bitwright.models.decoder import DecoderConfig, KeyValueCache

_PLAIN_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0}


def _bits(format_name: str, channels: int) -> float:
    if format_name in _PLAIN_BITS:
        return _PLAIN_BITS[format_name]
    return formats.parse(format_name).bits_per_element((1, channels))


def kv_bytes(config: Any, tokens: int, batch: int, keys: str, values: str | None = None) -> int:
    """Bytes of the key-value cache of `batch` sequences of `tokens` tokens, exact.

    `config` has `layers`, `kv_heads` and `head_dim` (`DecoderConfig`, `configurations.TransformerConfiguration`).
    `keys` and `values` (default: as keys) are number formats, or fp32, fp16, bf16. Raises InputError for other names
    and for sizes below 1.
    """
    if tokens < 1 or batch < 1:
        raise InputError(f"A cache of {tokens} tokens of {batch} sequences asked for; expected at least 1 of each.")
    heads = config.layers * config.kv_heads * tokens * batch
    bits = sum(_bits(name, config.head_dim) * config.head_dim for name in (keys, values or keys))
    return int(-(-heads * bits // 8))


def largest_batch(config: Any, tokens: int, memory_bytes: float, keys: str, values: str | None = None) -> int:
    """Sequences of `tokens` tokens whose caches fit into `memory_bytes`."""
    return int(memory_bytes // kv_bytes(config, tokens, 1, keys, values))


@dataclass
class _Packed:
    """Codes (layers, batch, kv_heads, capacity, bytes) and biased exponents (.., blocks), uint8."""

    form: SharedExponent
    codes: NDArray[np.uint8]
    exponents: NDArray[np.uint8]

    def write(self, layer: int, at: slice, x: Tensor) -> None:
        codes, exponents = (array[layer, :, :, at] for array in (self.codes, self.exponents))
        packed = self.form.pack(self.form.encode(x.float()))
        codes[:], exponents[:] = (
            packed[: codes.size].reshape(codes.shape),
            packed[codes.size :].reshape(exponents.shape),
        )

    def read(self, layer: int, end: int, channels: int) -> NDArray[np.float32]:
        codes, exponents = (array[layer, :, :, :end] for array in (self.codes, self.exponents))
        packed = np.concatenate([codes.reshape(-1), exponents.reshape(-1)])
        return self.form.decode(self.form.unpack(packed, (*codes.shape[:-1], channels)))


class BfpKVCache(KeyValueCache):
    """Keys and values of the positions seen so far in packed blocks; `keys` or `values` None keeps float32.

    Takes the place of `KeyValueCache`. Raises InputError for formats without a shared exponent, and blocks or bytes
    that a head's channels do not fill.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, capacity: int, keys: str | None = "bfp12_32",
        values: str | None = "bfp12_32",
    ) -> None:  # fmt: skip
        self.config, self.length, self.capacity = config, 0, capacity
        self._shape = (config.layers, batch, config.kv_heads, capacity)
        self._stores = [self._store(name) for name in (keys, values)]

    def _store(self, name: str | None) -> _Packed | Tensor:
        channels = self.config.head_dim
        if name is None:
            return torch.zeros(*self._shape, channels)
        form = formats.parse(name)
        if not isinstance(form, SharedExponent):
            raise InputError(f"{name} has no exponent shared by a block; expected for example bfp12_32 or mxfp8_e4m3.")
        if channels % form.block or channels * form.code_bits % 8:
            raise InputError(f"Heads of {channels} channels do not fill blocks of {name} and whole bytes.")
        codes = np.zeros((*self._shape, channels * form.code_bits // 8), np.uint8)
        return _Packed(form, codes, np.zeros((*self._shape, channels // form.block), np.uint8))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all buffers, for the whole capacity."""
        return sum(
            store.numel() * store.element_size() if isinstance(store, Tensor)
            else store.codes.nbytes + store.exponents.nbytes
            for store in self._stores
        )  # fmt: skip

    def packed(self, layer: int, sequence: int = 0) -> tuple[PackedHeads, PackedHeads]:
        """Keys and values of one layer and sequence as `kernels.block_floating_attention` reads them, without a copy.

        Raises InputError where one of them is kept in float32, or has codes that the kernel does not take.
        """
        found = []
        for store in self._stores:
            if isinstance(store, Tensor):
                raise InputError("Keys or values are kept in float32; the kernel reads packed ones.")
            if not isinstance(store.form.element, IntegerElement):
                raise InputError(f"{store.form.name} has floating-point elements; the kernel reads integers.")
            heads = PackedHeads(store.codes[layer, sequence], store.exponents[layer, sequence], store.form.code_bits)
            found.append(heads)
        return found[0], found[1]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Round and store (batch, kv_heads, tokens, head_dim) after `length`; returns all keys and values up to there,
        as stored. Raises InputError for other shapes, beyond the capacity, and for NaN and infinities."""
        wanted = (self._shape[1], self._shape[2], keys.shape[2] if keys.ndim == 4 else 0, self.config.head_dim)
        for name, new in (("Keys", keys), ("Values", values)):
            if tuple(new.shape) != wanted or not wanted[2]:
                raise InputError(f"{name} {tuple(new.shape)} do not fit the cache: (batch, kv_heads, tokens, head_dim) "
                                 f"= {wanted}, at least one token.")  # fmt: skip
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise InputError(f"{end} tokens exceed the cache's capacity of {self.capacity}.")
        at = slice(self.length, end)
        out = []
        for store, new in zip(self._stores, (keys, values), strict=True):
            if isinstance(store, Tensor):
                if not torch.isfinite(new).all():
                    raise InputError("The cache has no place for NaN or infinity.")
                store[layer, :, :, at] = new
                out.append(store[layer, :, :, :end].to(new.dtype))
            else:
                store.write(layer, at, new)
                out.append(torch.from_numpy(store.read(layer, end, self.config.head_dim)).to(new.device, new.dtype))
        return out[0], out[1]
