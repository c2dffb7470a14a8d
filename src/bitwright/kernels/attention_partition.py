"""Which worker computes which keys of which head in attention with few queries, and who merges the partial results.

The keys of every block (a key-value head of a sequence with the queries that share it) are cut in tiles, and the tiles
of all blocks are laid on one line, batch outermost, keys innermost. A partition is where each worker starts on it:

- `whole`: at every block (FlashAttention-2),
- `fixed_split`: at equal parts of every block (flash-decoding),
- `lean`: after equal numbers of tiles, across the ends of blocks (stream-K; Lean Attention).

The worker with the first tile of a block is its host, the others that hold tiles of it are its peers. The native kernel
executes a partition (`bitwright.kernels.decode_attention`) and a timeline of it predicts GPUs
(`bitwright.kernels.decode_attention_cost`). Source: arXiv 2405.10480 and its release in microsoft/onnxruntime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.quantity import is_whole

Schedule = Literal["lean", "fixed", "whole"]
SCHEDULES: tuple[Schedule, ...] = ("lean", "fixed", "whole")
MOST_SPLITS = 128  # flash-decoding's bound on the parts of a block
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Runs of consecutive tiles of one block that one worker computes, in the order of the line: `block`, `first` tile
    within it, `count` of tiles, `worker`; int64 (pieces,). Those of worker w are [bounds[w], bounds[w + 1])."""

    block: Indices
    first: Indices
    count: Indices
    worker: Indices
    bounds: Indices


@dataclass(frozen=True, eq=False)
class Partition:
    """`tiles` of every block, and the tile on the line at which every worker starts (`starts`, the total last).

    Raises InputError where the starts do not rise from 0 to the number of tiles.
    """

    tiles: Indices
    starts: Indices

    def __post_init__(self) -> None:
        if self.tiles.size == 0 or (self.tiles < 0).any():
            raise InputError(f"Blocks have zero tiles or more, and there is at least one; given {self.tiles.tolist()}.")
        if self.starts.size < 2 or self.starts[0] != 0 or self.starts[-1] != self.total:
            raise InputError(f"Workers start at tile 0 and end at {self.total}; given {self.starts.tolist()}.")
        if (np.diff(self.starts) < 0).any():
            raise InputError("Workers must start one after the other.")

    @cached_property
    def total(self) -> int:
        """Tiles of all blocks."""
        return int(self.tiles.sum())

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return int(self.starts.size) - 1

    @cached_property
    def loads(self) -> Indices:
        """Tiles of every worker."""
        return np.diff(self.starts)

    @cached_property
    def block_starts(self) -> Indices:
        """First tile of every block on the line, the total last."""
        return np.concatenate([[0], np.cumsum(self.tiles)]).astype(np.int64)

    @cached_property
    def pieces(self) -> Pieces:
        """The line cut wherever a block or a worker starts."""
        cuts = np.unique(np.concatenate([self.starts, self.block_starts]))
        begin, count = cuts[:-1], np.diff(cuts)
        block = np.searchsorted(self.block_starts, begin, side="right") - 1
        worker = self.worker_of(begin)
        bounds = np.searchsorted(worker, np.arange(self.workers + 1))
        return Pieces(block, begin - self.block_starts[block], count, worker, bounds.astype(np.int64))

    def worker_of(self, tile: NDArray[np.int64]) -> Indices:
        """The worker that computes a tile of the line: the inverse of `starts`."""
        return np.searchsorted(self.starts, tile, side="right") - 1

    @cached_property
    def table(self) -> Indices:
        """Block, first tile and count of every piece, (3, pieces)."""
        return np.array([self.pieces.block, self.pieces.first, self.pieces.count])

    @cached_property
    def splits(self) -> Indices:
        """Pieces of every block: 1 where nothing has to be merged, 0 for an empty block."""
        return np.bincount(self.pieces.block, minlength=self.tiles.size).astype(np.int64)

    def host(self, block: int) -> int:
        """The worker that merges a block. Raises InputError for an empty block."""
        if not self.tiles[block]:
            raise InputError(f"Block {block} has no tiles, so no worker merges it.")
        return int(self.worker_of(self.block_starts[block : block + 1])[0])

    def peers(self, block: int) -> list[int]:
        """The other workers that hold tiles of a block, in the order in which they are merged."""
        pieces = self.pieces
        return [int(worker) for worker in pieces.worker[pieces.block == block][1:]]

    def workspace_bytes(self, rows: int, channels: int) -> int:
        """Bytes of partial results: fp32 output and logarithm of the sum for every piece of a block that is split,
        and a counter of 4 bytes per block."""
        split = int(self.splits[self.splits > 1].sum())
        return 4 * (split * rows * (channels + 1) + int(self.tiles.size))


def tiles_of(lengths: Sequence[int], heads: int, tile: int) -> Indices:
    """Tiles of every (sequence, head) for keys per sequence, true lengths. Raises InputError for negative numbers."""
    if heads < 1 or tile < 1 or any(not is_whole(length) or length < 0 for length in lengths):
        raise InputError(f"Lengths {list(lengths)}, {heads} heads, tiles of {tile} keys: lengths are at least 0.")
    return np.repeat([-(-int(length) // tile) for length in lengths], heads).astype(np.int64)


def causal_tiles(tokens: int, rows: int, keys: int) -> int:
    """Tiles of one head of causal prefill with blocks of `rows` queries and `keys` keys: a block of queries needs the
    keys up to its own end."""
    return sum(ceil(min((row + 1) * rows, tokens) / keys) for row in range(ceil(tokens / rows)))


def lean_starts(total: int, workers: int) -> Indices:
    """Equal shares that differ by at most one tile, the larger ones first."""
    share = -(-total // workers)
    high = total - (share - 1) * workers
    worker = np.arange(workers + 1, dtype=np.int64)
    return np.where(worker < high, worker * share, high * share + (worker - high) * (share - 1))


def lean(tiles: Indices, workers: int, most_splits: int | None = None) -> Partition:
    """Equal numbers of tiles for `workers` (at most one per tile), across the ends of blocks.

    `most_splits` takes fewer workers where a block would be cut in more pieces. Raises InputError for less than one
    worker or split.
    """
    if workers < 1 or (most_splits is not None and most_splits < 1):
        raise InputError(f"{workers} workers, {most_splits} splits asked for; expected at least one of each.")
    tiles = np.asarray(tiles, np.int64)
    total, longest = int(tiles.sum()), int(tiles.max(initial=0))
    workers = max(1, min(workers, total))
    while most_splits is not None and workers > 1 and split_bound(total, longest, workers) > most_splits:
        workers -= 1
    return Partition(tiles, lean_starts(total, workers))


def lean_padded(tiles: Indices, workers: int) -> Partition:
    """Equal shares as if every block were as long as the longest: tiles that are not there take no time, so shares of
    ragged batches differ. The release does this; `lean` counts true lengths."""
    tiles = np.asarray(tiles, np.int64)
    longest = max(int(tiles.max(initial=0)), 1)
    workers = max(1, min(workers, longest * tiles.size))
    block, within = np.divmod(lean_starts(longest * tiles.size, workers)[:-1], longest)
    starts = (np.cumsum(tiles) - tiles)[block] + np.minimum(within, tiles[block])
    return Partition(tiles, np.append(starts, tiles.sum()).astype(np.int64))


def split_bound(total: int, longest: int, workers: int) -> int:
    """Most pieces that a block of `longest` tiles can be cut in: the release's bound on its workspace."""
    share = -(-total // workers)
    least = share if total % workers == 0 else share - 1
    return 1 + -(-max(longest - 1, 0) // max(least, 1))


def fixed_split(tiles: Indices, splits: int) -> Partition:
    """Every block in `splits` equal parts (the last ones may be shorter or empty), a worker for each.

    Raises InputError for more than 128 splits.
    """
    if not 1 <= splits <= MOST_SPLITS:
        raise InputError(f"{splits} splits of a block asked for; expected 1 to {MOST_SPLITS}.")
    tiles = np.asarray(tiles, np.int64)
    part = np.maximum(-(-tiles // splits), 1)
    within = np.minimum(np.arange(splits)[None] * part[:, None], tiles[:, None])
    starts = (np.cumsum(tiles) - tiles)[:, None] + within
    return Partition(tiles, _distinct(starts.reshape(-1), int(tiles.sum())))


def whole(tiles: Indices) -> Partition:
    """A worker for every block."""
    tiles = np.asarray(tiles, np.int64)
    return Partition(tiles, _distinct(np.cumsum(tiles) - tiles, int(tiles.sum())))


def _distinct(starts: Indices, total: int) -> Indices:
    """Starts without workers that have no tiles, and the total; one worker where there are no tiles at all."""
    found = np.unique(starts[starts < total])
    return np.append(found if found.size else [0], total).astype(np.int64)


def lean_workers(total: int, tiles_per_block: int, blocks: int, units: int) -> int:
    """Workers that the release starts on a device of `units` compute units, two per unit: at least two tiles for each
    where there are few, and no block in more than about 64 pieces."""
    if total <= 4 * units:
        found = min((total + 1) // 2, -(-32 * total // max(tiles_per_block, 1)))
    else:
        found = min(2 * units, 32 * blocks)
    return max(1, min(found, total))


def efficient_splits(blocks: int, tiles_per_block: int, slots: int) -> int:
    """Splits that flash-decoding takes: the fewest whose last wave leaves at most 15 % more of the slots empty than the
    best number does; none where blocks fill 80 % of the slots."""
    if blocks >= 0.8 * slots:
        return 1

    def efficiency(splits: int) -> float:
        waves = blocks * splits / slots
        return waves / ceil(waves)

    most = min(MOST_SPLITS, slots, max(tiles_per_block, 1))
    useful = [s for s in range(1, most + 1)
              if s == 1 or -(-tiles_per_block // s) != -(-tiles_per_block // (s - 1))]  # fmt: skip
    best = max(efficiency(splits) for splits in useful)
    return next(splits for splits in useful if efficiency(splits) >= 0.85 * best)


def partition(schedule: str, tiles: Indices, workers: int, splits: int | None = None) -> Partition:
    """A partition by name for so many equal workers; "fixed" takes `splits`, or flash-decoding's own number.

    Raises UnknownNameError for a name that is not in SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise UnknownNameError("schedule", schedule, SCHEDULES)
    if schedule == "lean":
        return lean(tiles, workers)
    if schedule == "whole":
        return whole(tiles)
    filled = int((np.asarray(tiles) > 0).sum())
    return fixed_split(tiles, splits or efficient_splits(max(filled, 1), int(np.max(tiles)), workers))


@lru_cache(maxsize=64)
def cached_partition(
    schedule: str, tiles: tuple[int, ...], heads: int, workers: int, splits: int | None = None
) -> Partition:
    """`partition` for tiles per sequence and heads; consecutive decoding steps mostly share it."""
    return partition(schedule, np.repeat(tiles, heads).astype(np.int64), workers, splits)
