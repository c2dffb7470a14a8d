"""Decode attention by any partition on GPUs, in Triton: one program per worker, as `decode_attention` on the CPU.

The program that finishes the last piece of a block merges its partial results, so no program waits for another and the
number of workers is not bound by what is resident. Needs the optional package triton. Source: arXiv 2405.10480.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from bitwright.core.errors import InputError
from bitwright.kernels.attention_partition import Partition


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _work(  # type: ignore[no-untyped-def]
    query, keys, values, out, lse, partial_out, partial_lse, missing, pieces, slots, first_piece, bounds, lengths,
    scale, count, key_steps_0, key_steps_1, key_steps_2, value_steps_0, value_steps_1, value_steps_2,
    HEADS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    ROWS_PADDED: tl.constexpr, CHANNELS_PADDED: tl.constexpr, VALUES_PADDED: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    row = tl.arange(0, ROWS_PADDED)
    channel = tl.arange(0, CHANNELS_PADDED)
    value_channel = tl.arange(0, VALUES_PADDED)
    result = row[:, None] * VALUES + value_channel[None, :]
    kept = (row[:, None] < ROWS) & (value_channel[None, :] < VALUES)
    for piece in range(tl.load(bounds + worker), tl.load(bounds + worker + 1)):
        block = tl.load(pieces + piece)
        first = tl.load(pieces + count + piece)
        tiles = tl.load(pieces + 2 * count + piece)
        sequence = block // HEADS
        head = block % HEADS
        length = tl.load(lengths + sequence)
        q = tl.load(
            query + block * ROWS * CHANNELS + row[:, None] * CHANNELS + channel[None, :],
            mask=(row[:, None] < ROWS) & (channel[None, :] < CHANNELS), other=0.0,
        )  # fmt: skip
        most = tl.full([ROWS_PADDED], float("-inf"), tl.float32)
        total = tl.zeros([ROWS_PADDED], tl.float32)
        made = tl.zeros([ROWS_PADDED, VALUES_PADDED], tl.float32)
        for tile in range(first, first + tiles):
            token = tile * TILE + tl.arange(0, TILE)
            k = tl.load(
                keys + sequence * key_steps_0 + head * key_steps_1 + token[None, :] * key_steps_2 + channel[:, None],
                mask=(token[None, :] < length) & (channel[:, None] < CHANNELS), other=0.0,
            )  # fmt: skip
            scores = tl.dot(q, k, input_precision="ieee") * (scale * 1.4426950408889634)
            scores = tl.where(token[None, :] < length, scores, float("-inf"))
            top = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - top[:, None])
            factor = tl.exp2(most - top)
            v = tl.load(
                values + sequence * value_steps_0 + head * value_steps_1 + token[:, None] * value_steps_2
                + value_channel[None, :],
                mask=(token[:, None] < length) & (value_channel[None, :] < VALUES), other=0.0,
            )  # fmt: skip
            made = made * factor[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * factor + tl.sum(weights, 1)
            most = top
        made = made / total[:, None]
        sums = (most + tl.log2(total)) * 0.6931471805599453
        slot = tl.load(slots + piece)
        if slot < 0:
            tl.store(out + block * ROWS * VALUES + result, made, mask=kept)
            tl.store(lse + block * ROWS + row, sums, mask=row < ROWS)
        else:
            tl.store(partial_out + slot * ROWS * VALUES + result, made, mask=kept)
            tl.store(partial_lse + slot * ROWS + row, sums, mask=row < ROWS)
            tl.debug_barrier()
            left = tl.atomic_add(missing + block, -1, sem="acq_rel")
            if left == 1:
                begin = tl.load(first_piece + block)
                end = tl.load(first_piece + block + 1)
                most = tl.full([ROWS_PADDED], float("-inf"), tl.float32)
                for other in range(begin, end):
                    at = tl.load(slots + other)
                    most = tl.maximum(most, tl.load(partial_lse + at * ROWS + row, mask=row < ROWS, other=0.0))
                total = tl.zeros([ROWS_PADDED], tl.float32)
                made = tl.zeros([ROWS_PADDED, VALUES_PADDED], tl.float32)
                for other in range(begin, end):
                    at = tl.load(slots + other)
                    weight = tl.exp(tl.load(partial_lse + at * ROWS + row, mask=row < ROWS, other=0.0) - most)
                    part = tl.load(partial_out + at * ROWS * VALUES + result, mask=kept, other=0.0)
                    made += weight[:, None] * part
                    total += weight
                tl.store(out + block * ROWS * VALUES + result, made / total[:, None], mask=kept)
                tl.store(lse + block * ROWS + row, most + tl.log(total), mask=row < ROWS)


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, partition: Partition, tile: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of `query` (sequences, heads, channels) over the first `lengths` (sequences,) tokens of `keys`,
    `values` (sequences, kv_heads, tokens, channels), all of one type, by a partition of tiles of `tile` keys: outputs
    (sequences, heads, value channels) in float32 and logarithms of sums (sequences, heads).

    Raises InputError for a tile that is not a power of two of at least 16, other shapes and another partition.
    """
    sequences, heads, channels = query.shape
    kv_heads, value_channels = keys.shape[1], values.shape[3]
    if tile < 16 or tile & (tile - 1):
        raise InputError(f"A tile of {tile} keys was given; Triton takes powers of two from 16.")
    if (
        keys.shape[0] != sequences
        or keys.shape[3] != channels
        or heads % kv_heads
        or keys.shape[:3] != values.shape[:3]
    ):
        raise InputError(f"Queries {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}.")
    given = [-(-int(length) // tile) for length in lengths.tolist() for _ in range(kv_heads)]
    if partition.tiles.tolist() != given or int(lengths.max()) > keys.shape[2]:
        raise InputError("The partition was made for other lengths or another tile, or a length exceeds the cache.")
    rows, device = heads // kv_heads, query.device

    def ints(numbers: Any, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(numbers, dtype=kind, device=device)

    pieces, splits = partition.pieces, ints(partition.splits)
    split = splits[ints(pieces.block)] > 1
    slots = torch.where(split, split.cumsum(0) - 1, -1)
    first_piece = torch.cat([ints([0]), splits.cumsum(0)])
    out = torch.zeros(sequences, kv_heads, rows, value_channels, device=device)
    lse = torch.full((sequences, kv_heads, rows), -torch.inf, device=device)
    used = max(int(split.sum()), 1)
    partial_out = torch.empty(used, rows, value_channels, device=device)
    partial_lse = torch.empty(used, rows, device=device)
    _work[(partition.workers,)](
        query.contiguous(), keys, values, out, lse, partial_out, partial_lse, splits.to(torch.int32),
        ints(partition.table), slots, first_piece, ints(pieces.bounds), ints(lengths),
        channels**-0.5 if scale is None else scale, len(pieces.block), *keys.stride()[:3], *values.stride()[:3],
        HEADS=kv_heads, ROWS=rows, CHANNELS=channels, VALUES=value_channels, TILE=tile, ROWS_PADDED=_power(rows),
        CHANNELS_PADDED=_power(channels), VALUES_PADDED=_power(value_channels),
    )  # fmt: skip
    return out.view(sequences, heads, value_channels), lse.view(sequences, heads)
