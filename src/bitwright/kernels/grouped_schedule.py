"""Tiles of many products of different sizes, handed to persistent workers: the scheduler of a grouped matrix product.

Each problem is cut into tiles of one size; tile t of all goes to worker t mod workers. A worker finds the problem of
its next tile by counting tiles problem by problem, or 32 problems at once: a warp loads them, each lane counts the
tiles of one, a prefix sum and a ballot give the problem. Source: arXiv 2210.03052, grouped GEMM, warp prefetching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError

WARP = 32


@dataclass(frozen=True)
class GroupedSchedule:
    """Tiles in the order of their numbers: `problem`, `row` and `column` (tiles,) of each, of `workers` workers."""

    problem: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    problems: int
    workers: int

    @property
    def tiles(self) -> int:
        """Tiles of all problems."""
        return len(self.problem)

    def of_worker(self, worker: int) -> NDArray[np.int64]:
        """Numbers of a worker's tiles, in its order."""
        return np.arange(worker, self.tiles, self.workers)

    def lookup_steps(self, at_once: int = WARP) -> int:
        """Loads of problem sizes by all workers together: every worker walks from the group of problems of its tile
        before to that of the next, `at_once` problems at a step."""
        steps = 0
        for worker in range(min(self.workers, self.tiles)):
            groups = self.problem[worker :: self.workers] // at_once
            steps += int(groups[-1]) + 1
        return steps

    def imbalance(self, cost: NDArray[np.float64] | None = None) -> float:
        """The most loaded worker's cost over the mean; `cost` (tiles,), default one each. 1 is even."""
        each = np.ones(self.tiles) if cost is None else cost
        if not self.tiles:
            return 1.0
        loads = np.bincount(np.arange(self.tiles) % self.workers, weights=each, minlength=self.workers)
        return float(loads.max() / loads.mean())


def grouped_schedule(sizes: Sequence[tuple[int, int]], tile: tuple[int, int], workers: int) -> GroupedSchedule:
    """The tiles of results (m, n) of every problem. Problems without results have none.

    Raises InputError for negative sizes, tiles or workers below 1.
    """
    given = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    if (given < 0).any() or min(tile) < 1 or workers < 1:
        raise InputError(f"Sizes {sizes!r:.80} in tiles of {tile} on {workers} workers: expected sizes from 0, and 1.")
    counts = -(-given // np.asarray(tile))
    per_problem = counts.prod(1)
    problem = np.repeat(np.arange(len(given)), per_problem)
    first = np.concatenate(([0], np.cumsum(per_problem)))[:-1]
    inside = np.arange(len(problem)) - first[problem]
    columns = np.maximum(counts[problem, 1], 1)
    return GroupedSchedule(problem, inside // columns, inside % columns, len(given), workers)


def score_touches(lengths: Sequence[int], longest: int, heads: int, fused: bool) -> int:
    """Elements of score matrices that pass main memory in attention of long sequences.

    Fused (partial softmax in the first product's epilogue, the rest in the second's prologue) writes and reads each
    real score once; padded attention with a separate softmax writes and reads every score twice.
    """
    scores = sum(length * length for length in lengths) if fused else len(lengths) * longest * longest
    return heads * scores * (2 if fused else 4)
