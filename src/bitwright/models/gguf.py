"""GGUF files: a checked reader of the container, and a Llama decoder and its tokenizer from one.

The container is read by our own parser rather than by `gguf.GGUFReader` because a file is untrusted input: every count,
length and offset is compared with the file's size before anything of that size is allocated. The block formats are
dequantised by the `gguf` package (`gguf.quants`), one tensor at a time from a memory map.

Source of the layout: the GGUF specification, version 3 (ggml repository, docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bitwright.core.errors import InputError
from bitwright.models.byte_level import byte_level_tokenizer
from bitwright.models.decoder import Decoder, DecoderConfig, assign_weights, checked_config

SUPPORTED_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K")
)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_NUMPY = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as stored: `shape` outermost first (torch order), `offset` and `size` in bytes within the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read and checked; tensors are read on demand."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor `name`, dequantised to float32, in its torch shape.

        Raises InputError when the file holds no such tensor or its format is not in `SUPPORTED_TYPES`.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise InputError(f"{self.path} holds no tensor {name!r}; it holds {len(self.tensors)} others.")
        if tensor.type not in SUPPORTED_TYPES:
            known = ", ".join(kind.name for kind in SUPPORTED_TYPES)
            raise InputError(f"{self.path}: tensor {name!r} is stored as {tensor.type.name}; supported are {known}.")
        blocks = self.blocks(name)
        rows = blocks.reshape(*tensor.shape[:-1], -1)
        values = np.asarray(dequantize(rows, tensor.type), np.float32).reshape(tensor.shape)
        return values if values.flags.owndata else values.copy()

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of tensor `name`, a map of the file: its shape, the last axis cut into (blocks, bytes)."""
        tensor = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.size,))
        return raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block, block_bytes)


class _Cursor:
    """Reads little-endian values from `data`; asking past the end is an InputError, before any allocation."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def broken(self, why: str) -> InputError:
        return InputError(f"{self.path} is not a usable GGUF file: {why} (byte {self.at} of {len(self.data)}).")

    def claim(self, size: int, what: str) -> int:
        """Step over `size` bytes and return where they start."""
        if size > len(self.data) - self.at:
            raise self.broken(f"{what} needs {size} bytes but the file ends before; it is truncated or damaged")
        start = self.at
        self.at += size
        return start

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack_from(code, self.data, self.claim(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        size = self.scalar("<Q", f"the length of {what}")
        start = self.claim(size, what)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8 text") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.broken(f"{what} has the unknown value type {kind}")
        item, count = self.scalar("<I", what), self.scalar("<Q", what)
        if item in _NUMPY:
            dtype = np.dtype(_NUMPY[item])
            start = self.claim(count * dtype.itemsize, what)
            return np.frombuffer(self.data, dtype, count, start).tolist()
        if item != _STRING:
            raise self.broken(f"{what} is an array of value type {item}, which is not supported")
        if count * 8 > len(self.data) - self.at:  # a string takes at least its length field
            raise self.broken(f"{what} announces {count} strings, more than the file can hold")
        return [self.string(what) for _ in range(count)]


def read_gguf(path: Path | str) -> GgufFile:
    """Read and check the header of a GGUF file (version 2 or 3, little-endian); no tensor data is read.

    Raises InputError, naming the file, when it is missing, truncated, or states counts, shapes or offsets that do
    not fit in it.
    """
    path = Path(path)
    try:
        if path.stat().st_size < 24:  # also because an empty file cannot be mapped
            raise InputError(f"{path} is not a usable GGUF file: it is shorter than the fixed part of the header.")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(path, data))
    except OSError as error:
        raise InputError(f"Cannot read the GGUF file {path}: {error.strerror or error}.") from error


def _parse(cursor: _Cursor) -> GgufFile:
    if cursor.data[:4] != b"GGUF":
        raise cursor.broken("it does not begin with the letters GGUF")
    cursor.at = 4
    version = cursor.scalar("<I", "the version")
    if version not in (2, 3):
        raise cursor.broken(f"version {version} is not supported (2 and 3 in little-endian order are)")
    tensor_count = cursor.scalar("<Q", "the tensor count")
    field_count = cursor.scalar("<Q", "the metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):  # each turn consumes bytes, so a false count ends at the end of the file
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.broken(f"the metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.scalar("<I", f"the type of {key!r}"), f"the value of {key!r}")
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.broken(f"general.alignment is {alignment!r}, not a power of two")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            raise cursor.broken(f"the tensor {name!r} appears twice")
        tensors[name] = _checked_tensor(cursor, name, kind, shape, base + offset)
    end = 0
    for tensor in sorted(tensors.values(), key=lambda each: each.offset):
        if tensor.offset < end:
            raise cursor.broken(f"the tensor {tensor.name!r} overlaps another one")
        end = tensor.offset + tensor.size
    return GgufFile(cursor.path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string("a tensor name")
    rank = cursor.scalar("<I", f"the rank of {name!r}")
    if not 1 <= rank <= 4:
        raise cursor.broken(f"tensor {name!r} has {rank} dimensions; GGUF allows 1 to 4")
    extents = [cursor.scalar("<Q", f"the shape of {name!r}") for _ in range(rank)]
    kind = cursor.scalar("<I", f"the type of {name!r}")
    offset = cursor.scalar("<Q", f"the offset of {name!r}")
    return name, kind, tuple(reversed(extents)), offset


def _checked_tensor(cursor: _Cursor, name: str, kind: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
    try:
        encoding = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[encoding]
    except (ValueError, KeyError):
        raise cursor.broken(f"tensor {name!r} has the unknown type number {kind}") from None
    if 0 in shape or shape[-1] % block:
        raise cursor.broken(f"tensor {name!r} of shape {shape} does not divide into {encoding.name} blocks of {block}")
    size = math.prod(shape) // block * block_bytes
    if offset + size > len(cursor.data):
        raise cursor.broken(
            f"tensor {name!r} lies at bytes {offset} to {offset + size}, past the end; it is truncated or damaged"
        )
    return GgufTensor(name, encoding, shape, offset, size)


def _field(file: GgufFile, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    value = file.metadata.get(key, default)
    if value is None:
        raise InputError(f"{file.path} lacks the metadata field {key!r} that a Llama-like model needs.")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(f"{file.path}: the metadata field {key!r} is {value!r}; expected a single number.")
    return value


def decoder_config_from_gguf(file: GgufFile) -> DecoderConfig:
    """The decoder's configuration from the metadata of a GGUF file with `general.architecture` "llama".

    Raises InputError for another architecture, mixtures of experts, and missing or contradictory fields.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{file.path} holds a model of architecture {architecture!r}; supported is 'llama'.")
    if file.metadata.get("llama.expert_count", 0):
        raise InputError(f"{file.path} holds a mixture of experts, which the executable decoder does not support.")
    if file.metadata.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(f"{file.path} scales its rotary positions, which the executable decoder does not support.")
    hidden = _field(file, "llama.embedding_length", int)
    heads = _field(file, "llama.attention.head_count", int)
    head_dim = _field(file, "llama.attention.key_length", int, hidden // max(heads, 1))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{file.path} holds no two-dimensional tensor 'token_embd.weight'.")
    factors: tuple[float, ...] = ()
    if "rope_freqs.weight" in file.tensors and math.prod(file.tensors["rope_freqs.weight"].shape) <= hidden:
        factors = tuple(file.read("rope_freqs.weight").ravel().tolist())
    if file.metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{file.path} rotates only a part of each head, which the decoder does not support.")
    return checked_config(
        str(file.path),
        vocabulary=embedding.shape[0],
        hidden=hidden,
        layers=_field(file, "llama.block_count", int),
        heads=heads,
        kv_heads=_field(file, "llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        feed_forward=_field(file, "llama.feed_forward_length", int),
        norm_eps=_field(file, "llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=_field(file, "llama.rope.freq_base", float, 10000.0),
        rope_factors=factors,
        tied_embeddings="output.weight" not in file.tensors,
        max_positions=_field(file, "llama.context_length", int),
    )


def gguf_names(config: DecoderConfig) -> dict[str, str]:
    """Parameter name of `Decoder` -> tensor name in a GGUF file."""
    names = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    if not config.tied_embeddings:
        names["lm_head.weight"] = "output.weight"
    parts = {
        "attention_norm": "attn_norm", "attention.query": "attn_q", "attention.key": "attn_k",
        "attention.value": "attn_v", "attention.output": "attn_output", "feed_forward_norm": "ffn_norm",
        "feed_forward.gate": "ffn_gate", "feed_forward.up": "ffn_up", "feed_forward.down": "ffn_down",
    }  # fmt: skip
    for layer in range(config.layers):
        for ours, theirs in parts.items():
            names[f"layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return names


def decoder_tensors(file: GgufFile) -> tuple[DecoderConfig, dict[str, str]]:
    """The configuration and `gguf_names` of a file whose tensors all have a place in a `Decoder`.

    Raises InputError as `decoder_config_from_gguf` does, and for layers without tensors and tensors without a place.
    """
    config = decoder_config_from_gguf(file)
    if config.layers > len(file.tensors):  # before a module of that many layers is built
        raise InputError(f"{file.path} announces {config.layers} layers but holds only {len(file.tensors)} tensors.")
    names = gguf_names(config)
    extra = {name for name in file.tensors if name.startswith("blk.")} - set(names.values())
    if extra:
        raise InputError(f"{file.path} holds tensors this decoder has no place for: {', '.join(sorted(extra)[:4])}.")
    return config, names


def decoder_from_gguf(file: GgufFile, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder with the file's weights, dequantised to float32 and then cast to `dtype`.

    GGUF stores the rows of the query and key projections with the two halves of every head interleaved
    (llama.cpp rotates neighbouring pairs); they are put back in the order of halves that `Decoder` rotates.

    Raises InputError when tensors are missing, have other shapes than the metadata says, or an unsupported format.
    """
    config, names = decoder_tensors(file)

    def read(name: str) -> torch.Tensor:
        weight = torch.from_numpy(file.read(names[name]))
        if name.endswith(("query.weight", "key.weight")):
            heads = config.heads if name.endswith("query.weight") else config.kv_heads
            pairs = weight.view(heads, config.head_dim // 2, 2, config.hidden)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        return weight.to(dtype)

    shapes = {ours: file.tensors[theirs].shape for ours, theirs in names.items() if theirs in file.tensors}
    return assign_weights(config, shapes, read, str(file.path))


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer described by the metadata (`tokenizer.ggml.model` "gpt2").

    The split of text before BPE follows `tokenizer.ggml.pre`, so that ids are those of the model's own tokenizer.

    Raises InputError for other kinds of tokenizer and for contradictory tables.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(f"{file.path} has a tokenizer of kind {kind!r}; supported is byte-level BPE ('gpt2').")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not _strings(tokens) or not _strings(merges):
        raise InputError(f"{file.path} lacks the token table or the merge table of its tokenizer.")
    types = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(f"{file.path} gives {len(types)} token types for {len(tokens)} tokens.")
    begin = file.metadata.get("tokenizer.ggml.bos_token_id")
    split = file.metadata.get("tokenizer.ggml.pre", "default")
    add_begin = file.metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe")
    if not add_begin:
        begin_token = None
    elif isinstance(begin, int) and 0 <= begin < len(tokens):
        begin_token = tokens[begin]
    else:
        raise InputError(f"{file.path} asks for a begin-of-text token but its id {begin!r} is not in the table.")
    return byte_level_tokenizer(
        tokens,
        merges,
        split,
        special=[token for token, of in zip(tokens, types, strict=True) if of == 3],
        user_defined=[token for token, of in zip(tokens, types, strict=True) if of == 4],
        begin=begin_token,
        source=str(file.path),
    )


def _strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)
