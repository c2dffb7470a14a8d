"""Partitions of attention over workers: every tile once, equal loads, maps that agree, bounds that hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels import attention_partition as ap

tiles = st.lists(st.integers(0, 40), min_size=1, max_size=12).map(lambda given: np.array(given, np.int64))


def covered(partition):
    """Worker of every (block, tile), each exactly once."""
    pieces = partition.pieces
    found = {}
    for block, first, count, worker in zip(pieces.block, pieces.first, pieces.count, pieces.worker, strict=True):
        for tile in range(first, first + count):
            assert (block, tile) not in found
            found[int(block), int(tile)] = int(worker)
    return found


@settings(max_examples=150, deadline=None)
@given(tiles, st.integers(1, 60), st.sampled_from(ap.SCHEDULES), st.integers(1, 9))
def test_every_tile_once_and_maps_agree(tiles, workers, schedule, splits):
    made = ap.partition(schedule, tiles, workers, splits)
    found = covered(made)
    assert set(found) == {(block, tile) for block, count in enumerate(tiles) for tile in range(count)}
    line = made.worker_of(np.arange(made.total))
    assert [found[key] for key in sorted(found)] == line.tolist()
    assert (np.bincount(line, minlength=made.workers) == made.loads).all()
    assert made.pieces.bounds[-1] == len(made.pieces.block)
    for block in np.flatnonzero(tiles):
        order = [found[int(block), tile] for tile in range(tiles[block])]
        assert [made.host(int(block)), *made.peers(int(block))] == list(dict.fromkeys(order))
        assert made.splits[block] == len(set(order))


@settings(max_examples=150, deadline=None)
@given(tiles, st.integers(1, 500))
def test_lean_shares_are_equal_and_splits_bounded(tiles, workers):
    made = ap.lean(tiles, workers)
    assert made.loads.max() - made.loads.min() <= 1
    assert (np.diff(made.loads) <= 0).all()
    assert made.splits.max(initial=0) <= ap.split_bound(made.total, int(tiles.max()), made.workers)
    bounded = ap.lean(tiles, workers, most_splits=4)
    assert bounded.splits.max(initial=0) <= 4
    # The released inverse map, in closed form.
    share = -(-made.total // made.workers)
    high = made.total - (share - 1) * made.workers
    for tile in range(made.total):
        worker = tile // share if tile < high * share else high + (tile - high * share) // (share - 1)
        assert made.worker_of(np.array([tile]))[0] == worker


@settings(max_examples=60, deadline=None)
@given(tiles, st.integers(1, 60))
def test_shares_of_the_longest_cover_ragged_blocks(tiles, workers):
    made = ap.lean_padded(tiles, workers)
    assert len(covered(made)) == tiles.sum()
    if (tiles == tiles[0]).all() and tiles[0]:
        assert made.starts.tolist() == ap.lean(tiles, workers).starts.tolist()


def test_whole_and_fixed():
    tiles = np.array([5, 0, 8])
    assert ap.whole(tiles).loads.tolist() == [5, 8]
    assert ap.fixed_split(tiles, 3).loads.tolist() == [2, 2, 1, 3, 3, 2]
    assert ap.fixed_split(tiles, 8).splits.tolist() == [5, 0, 8]
    assert ap.lean(tiles, 4).loads.tolist() == [4, 3, 3, 3]
    assert ap.lean(tiles, 4).peers(2) == [2, 3]


def test_released_numbers_of_workers_and_splits():
    # T <= 4 * SM: half the tiles; else two per SM; never more than 32 per block, worked out by hand.
    assert ap.lean_workers(100, 100, 1, 108) == 32
    assert ap.lean_workers(400, 50, 8, 108) == 200
    assert ap.lean_workers(10_000, 100, 100, 108) == 216
    assert ap.lean_workers(10_000, 10_000, 1, 108) == 32
    assert ap.lean_workers(1, 1, 1, 108) == 1
    assert ap.efficient_splits(100, 64, 108) == 1  # 80 % full
    assert ap.efficient_splits(1, 64, 108) == 64
    assert ap.efficient_splits(54, 64, 108) == 2
    assert ap.efficient_splits(36, 64, 108) == 3


def test_causal_tiles_count_the_lower_triangle():
    for tokens, rows, keys in ((256, 64, 64), (300, 64, 128), (1, 64, 64)):
        needed = {(row // rows, key // keys) for row in range(tokens) for key in range(row + 1)}
        last = {row // rows: min((row // rows + 1) * rows, tokens) for row in range(tokens)}
        needed |= {(row, key // keys) for row, end in last.items() for key in range(end)}
        assert ap.causal_tiles(tokens, rows, keys) == len(needed)


def test_workspace_and_bad_input():
    made = ap.lean(np.array([4, 4]), 3)
    assert made.splits.tolist() == [2, 2]
    assert made.workspace_bytes(rows=8, channels=64) == 4 * (4 * 8 * 65 + 2)
    assert ap.whole(np.array([4, 4])).workspace_bytes(8, 64) == 8
    for bad in (
        lambda: ap.lean(np.array([3]), 0),
        lambda: ap.fixed_split(np.array([3]), 129),
        lambda: ap.Partition(np.array([3]), np.array([0, 2])),
        lambda: ap.Partition(np.array([3]), np.array([0, 2, 1, 3])),
        lambda: ap.Partition(np.array([-1]), np.array([0, 2])),
        lambda: ap.tiles_of([3, -1], 1, 16),
        lambda: ap.whole(np.array([0, 2])).host(0),
    ):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(UnknownNameError, match="lean"):
        ap.partition("stream", np.array([3]), 2)
    assert ap.tiles_of([0, 1, 64, 65], 2, 64).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
