"""The scheduler of grouped products: every tile once, fewer look-ups by warps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.kernels.grouped_schedule import grouped_schedule, score_touches


@given(
    sizes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=20),
    tile=st.tuples(st.integers(1, 128), st.integers(1, 128)), workers=st.integers(1, 40),
)  # fmt: skip
def test_every_tile_is_visited_once(sizes, tile, workers):
    plan = grouped_schedule(sizes, tile, workers)
    expected = [
        (p, i, j)
        for p, (m, n) in enumerate(sizes)
        for i in range(0, -(-m // tile[0]))
        for j in range(0, -(-n // tile[1]))
    ]
    visited = sorted(
        (int(plan.problem[t]), int(plan.row[t]), int(plan.column[t]))
        for worker in range(workers)
        for t in plan.of_worker(worker)
    )
    assert visited == sorted(expected)


def test_a_warp_looks_up_32_problems_at_once():
    plan = grouped_schedule([(128, 128)] * 3200, (128, 128), 64)
    assert plan.lookup_steps(1) == sum(3200 - 64 + worker + 1 for worker in range(64))
    assert plan.lookup_steps(1) / plan.lookup_steps() == pytest.approx(32, rel=0.02)


def test_imbalance_of_workers():
    even = grouped_schedule([(256, 256)] * 10, (64, 64), 16)
    assert even.imbalance() == 1.0
    assert grouped_schedule([(64, 64)] * 17, (64, 64), 16).imbalance() == pytest.approx(2 / (17 / 16))
    assert even.imbalance(np.r_[100.0, np.zeros(159)]) == 16
    assert grouped_schedule([(0, 5)], (64, 64), 4).imbalance() == 1.0


def test_touches_of_scores():
    assert score_touches([512, 512], 512, 12, fused=False) == 2 * score_touches([512, 512], 512, 12, fused=True)
    assert score_touches([256, 512], 512, 1, fused=True) == 2 * (256**2 + 512**2)


@pytest.mark.parametrize("arguments", [([(-1, 2)], (8, 8), 1), ([(1, 2)], (0, 8), 1), ([(1, 2)], (8, 8), 0)])
def test_bad_input(arguments):
    with pytest.raises(InputError, match="workers"):
        grouped_schedule(*arguments)
