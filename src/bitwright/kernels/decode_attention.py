"""Attention of one new token per sequence over its cache of keys and values, in parts that every worker gets alike.

The partition (`attention_partition`) is executed as it stands: workers compute their pieces, in any order and on any
number of threads, and whoever finishes the last piece of a block merges its partial results in the order of the keys.
So the result depends on the partition, never on threads or timing, and nobody waits. Query heads that share a
key-value head are the rows of one block, so each key is read once for all of them. Caches are float32, float16 or
bfloat16; arithmetic is float32. Source: arXiv 2405.10480 (Lean Attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.attention_partition import Partition, cached_partition
from bitwright.kernels.threads import thread_count, usable_path

PATHS = ("avx512", "avx2", "portable")
_FASTEST = _native.decode_attention_path()
_L2_BYTES = 512 * 1024  # half of a core's second-level cache: keys and values of a tile stay there
_TYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
_WORKERS_PER_THREAD = 4  # so that a thread that is slowed down leaves some of its share to others
_BYTES_PER_THREAD = 512 * 1024  # less is done before another thread has woken up


@cache
def _type(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def default_tile(key_bytes: int, longest: int, blocks: int, workers: int) -> int:
    """Keys per tile: keys and values (`key_bytes` of one key and its value) fill at most half of a second-level cache,
    and every worker gets some eight tiles or more, of at least 64 keys."""
    most = max(16, _L2_BYTES // max(key_bytes, 1) // 16 * 16)
    fine = -(-longest * blocks // (8 * workers * 16)) * 16
    return min(most, max(64, fine))


def _cached(array: Any, name: str, axes: Sequence[str]) -> tuple[Any, str]:
    """Keys or values as an array of numpy over the same memory (bfloat16 as its bits), and the name of their type."""
    kind = _type(array.dtype)
    if kind not in _TYPES or array.ndim != len(axes) or 0 in array.shape:
        raise InputError(
            f"{name} are ({', '.join(axes)}) in {', '.join(_TYPES)}, not {kind} {tuple(array.shape)}."
        )  # fmt: skip
    if not isinstance(array, np.ndarray):
        if array.device.type != "cpu":
            raise InputError(f"{name} on {array.device} were given; this kernel runs on the CPU.")
        if kind == "bfloat16":
            import torch

            array = array.view(torch.int16)
        array = (array.detach() if array.requires_grad else array).numpy()
    if array.strides[-1] != array.itemsize or min(array.strides) < 0:
        raise InputError(f"The channels of {name} must lie next to each other in memory, in rising order.")
    return array, kind


def _lengths(given: Any, sequences: int, room: int) -> tuple[int, ...]:
    if given is None:
        return (room,) * sequences
    array = np.asarray(given)
    if array.dtype.kind not in "iu":
        raise InputError(f"Lengths are whole numbers, one per sequence, not {given!r}.")
    found = tuple(array.reshape(-1).tolist())
    if len(found) != sequences or not all(0 <= length <= room for length in found):
        raise InputError(f"Lengths {list(found)} were given for {sequences} sequences and room for {room} tokens.")
    return found


def decode_attention(
    query: Any, keys: Any, values: Any, lengths: Sequence[int] | Any | None = None, *, schedule: str = "lean",
    tile: int | None = None, workers: int | None = None, splits: int | None = None, scale: float | None = None,
    page_table: Any | None = None, append: tuple[Any, Any] | None = None, partition: Partition | None = None,
    return_lse: bool = False, threads: int | None = None, path: str | None = None,
) -> Any:  # fmt: skip
    """softmax(scale * query . keys) . values over the first `lengths[b]` tokens of sequence b.

    `query` (sequences, heads, channels), floating; `keys`, `values` (sequences, kv_heads, tokens, channels), float32,
    float16 or bfloat16, numpy arrays or torch tensors of any strides whose channels are contiguous; consecutive heads
    share a key-value head. With `page_table` (sequences, pages per sequence) they are (pages, kv_heads, tokens per
    page, channels). `append` = new keys and values (sequences, kv_heads, channels) of the cache's type, written to the
    last token of every sequence, which must not be empty, by whoever computes it. Returns (sequences, heads, value
    channels) in the type of `query`, and with `return_lse` the logarithm of each sum of exponentials, float32
    (sequences, heads). A sequence of length 0 gives 0 and -inf.

    `schedule`: "lean", "fixed" (with `splits`) or "whole", over `workers` (default: one, or four per thread where the
    cache is large enough for several), in tiles of `tile` keys; or a `partition` made for these lengths and that tile.
    `scale`: 1 / sqrt(channels) by default. Raises InputError for what does not fit, queries with NaN or infinities,
    pages that do not exist; the cache is not scanned (NaN in it spreads to the output).
    """
    is_torch = not isinstance(query, np.ndarray)
    kind = _type(query.dtype)
    if query.ndim != 3 or 0 in query.shape or kind not in (*_TYPES, "float64"):
        raise InputError(f"Queries are floating (sequences, heads, channels), not {kind} {tuple(query.shape)}.")
    q = query.detach().float().contiguous().numpy() if is_torch else np.ascontiguousarray(query, np.float32)
    axes = ("sequences" if page_table is None else "pages", "kv_heads", "tokens", "channels")
    (k, type_k), (v, type_v) = _cached(keys, "keys", axes), _cached(values, "values", axes)
    if type_k != type_v or k.shape[:3] != v.shape[:3]:
        raise InputError(f"Keys {type_k} {k.shape} and values {type_v} {v.shape} are not of one cache.")
    sequences, heads, channels = q.shape
    kv_heads, room, value_channels = k.shape[1], k.shape[2], v.shape[3]
    table = None
    if page_table is not None:
        table = np.asarray(page_table)
        if table.dtype.kind not in "iu" or table.ndim != 2 or len(table) != sequences or not table.size:
            raise InputError(
                f"A page table is whole numbers (sequences, pages), not {table.dtype} {table.shape} for {sequences} "
                "sequences."
            )
        table = np.ascontiguousarray(table, np.int64)
        room *= table.shape[1]
    elif k.shape[0] != sequences:
        raise InputError(f"Queries of {sequences} sequences and a cache of {k.shape[0]} were given.")
    if heads % kv_heads or k.shape[3] != channels:
        raise InputError(f"Queries {q.shape} do not fit {kv_heads} key-value heads of {k.shape[3]} channels.")
    tokens = _lengths(lengths, sequences, room)
    new_k, new_v = (None, None) if append is None else _appended(append, k, v, (type_k, sequences), tokens)
    key_bytes = (channels + value_channels) * k.itemsize
    count = min(thread_count(threads), max(1, sum(tokens) * kv_heads * key_bytes // _BYTES_PER_THREAD))
    if workers is None:
        workers = _WORKERS_PER_THREAD * count if count > 1 else 1
    if tile is None:
        tile = default_tile(key_bytes, max(tokens), sequences * kv_heads, max(workers, 1))
    if tile < 1 or workers < 1:
        raise InputError(f"Tiles of {tile} keys on {workers} workers asked for; expected at least one of each.")
    if partition is None:
        partition = cached_partition(schedule, tuple([-(-t // tile) for t in tokens]), kv_heads, workers, splits)
    out = np.empty((sequences, kv_heads, heads // kv_heads, value_channels), np.float32)
    lse = np.empty((sequences, kv_heads, heads // kv_heads), np.float32)
    try:
        _native.decode_attention(
            q.reshape(sequences, kv_heads, -1, channels), k, v, np.array(tokens, np.int64), table, new_k, new_v,
            partition.table, partition.pieces.bounds, type_k, tile, channels**-0.5 if scale is None else scale,
            usable_path(path, PATHS, _FASTEST, "decode attention"), count, out, lse,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"Attention over the cache cannot be computed: {error}.") from None
    result: Any = out.reshape(sequences, heads, value_channels)
    total: Any = lse.reshape(sequences, heads)
    if is_torch:
        import torch

        result = torch.from_numpy(result)
        result = result if kind == "float32" else result.to(query.dtype)
        return (result, torch.from_numpy(total)) if return_lse else result
    result = result.astype(query.dtype, copy=False)
    return (result, total) if return_lse else result


def _appended(
    append: tuple[Any, Any], keys: Any, values: Any, expected: tuple[str, int], tokens: tuple[int, ...]
) -> tuple[Any, Any]:
    """New keys and values that fit the cache."""
    if not all(tokens):
        raise InputError("New keys and values are the last token of every sequence; a sequence has length 0.")
    found = []
    for name, new, stored in zip(("keys", "values"), append, (keys, values), strict=True):
        array, kind = _cached(new, f"new {name}", ("sequences", "kv_heads", "channels"))
        shape = (expected[1], stored.shape[1], stored.shape[3])
        if kind != expected[0] or array.shape != shape:
            raise InputError(f"New {name} are {expected[0]} {shape}, not {kind} {array.shape}.")
        if not stored.flags.writeable:
            raise InputError(f"New {name} were given for a cache that is read-only.")
        found.append(np.ascontiguousarray(array))
    return found[0], found[1]
