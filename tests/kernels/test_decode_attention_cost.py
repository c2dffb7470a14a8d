"""Decode attention on GPUs, simulated: cases worked out by hand, and the same partition as the kernel executes."""

import numpy as np
import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import load_machine
from bitwright.kernels import attention_partition as ap
from bitwright.kernels import decode_attention_cost as cost

A100 = load_machine("a100-80g").device()


def test_by_hand():
    # Two blocks of 3 tiles on 3 slots: shares of 2; the middle worker is a peer of block 0 and host of block 1.
    made = cost.simulate(ap.lean(np.array([3, 3]), 3), 3, tile_s=1.0, result_s=0.25)
    starts, ends = made.schedule.start[:3], made.schedule.finish[:3]
    assert starts.tolist() == [0, 0, 0]
    assert ends.tolist() == [2.25, 2.5, 2.25]
    assert made.time_s == pytest.approx(2.5 + 0.5 + cost.FENCE_S)
    whole = cost.simulate(ap.whole(np.array([3, 3, 3])), 2, tile_s=1.0, result_s=0.25, launch_s=0.5)
    assert whole.time_s == pytest.approx(6.5)  # two waves and the launch; nothing to merge
    assert whole.workspace_bytes == 0
    assert whole.occupancy == pytest.approx(9 / 13)
    split = cost.simulate(ap.fixed_split(np.array([4]), 2), 2, 1.0, 0.25, launch_s=0.5, separate_merge=True)
    assert split.time_s == pytest.approx(0.5 + 2.25 + 0.5 + 0.5 + cost.FENCE_S)


def test_two_waves_against_one():
    # 4 sequences of 56 heads on 216 slots are 224 blocks: a second, nearly empty wave without lean.
    shape = cost.DecodeShape((131072,) * 4, 56, 56, 128)
    for baseline in ("whole", "fixed", "fixed-early"):
        assert cost.speed_up(A100, shape, baseline) == pytest.approx(2 * 216 / 224, rel=0.01)
    assert cost.speed_up(A100, cost.DecodeShape((524288,), 32, 32, 128), "whole") == pytest.approx(216 / 32, rel=0.01)


def test_long_contexts_are_limited_by_bandwidth_alone():
    shape = cost.DecodeShape((262144,), 64, 8, 128)
    made = cost.simulate_decode(A100, shape)
    assert made.occupancy > 0.98
    assert made.time_s == pytest.approx(shape.cache_bytes / 2.039e12, rel=0.02)
    assert made.merge_share < 0.03
    assert shape.rows == 8


def test_ragged_batches_count_true_lengths():
    shape = cost.DecodeShape((200_000, 1000, 1000, 1000), 8, 8, 128)
    assert cost.speed_up(A100, shape, "lean-padded") > 2
    assert cost.speed_up(A100, shape, "whole") > 10


def test_prefill_gains_at_short_context():
    found = [
        cost.simulate_causal_prefill(A100, tokens, 32, 128, "whole").time_s
        / cost.simulate_causal_prefill(A100, tokens, 32, 128).time_s
        for tokens in (1024, 16384)
    ]
    assert found[0] > found[1] > 1


def test_work_counts():
    counted = cost.decode_work(cost.DecodeShape((100, 50), 8, 2, 64), pieces=4)
    assert counted.traffic["memory"] == 150 * 2 * 128 * 2
    assert counted.operations["fp32"] == 150 * 8 * (2 * 128 + 22)


def test_bad_input():
    with pytest.raises(UnknownNameError):
        cost.gpu_partition("stream", [3], 108)
    with pytest.raises(InputError, match="wait for each other"):
        cost.simulate(ap.lean(np.array([9]), 3), 2, 1.0, 0.1)
    for bad in (lambda: cost.DecodeShape((10,), 8, 3, 64), lambda: cost.DecodeShape((), 8, 8, 64)):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(InputError, match="cores"):
        cost.simulate_decode(A100.model_copy(update={"cores": None}), cost.DecodeShape((10,), 8, 8, 64))
