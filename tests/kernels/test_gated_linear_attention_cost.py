"""Predicted GPU times of gated linear attention: counts worked out by hand, and how they grow."""

import pytest

from bitwright.core.errors import InputError
from bitwright.core.machine import load_machine
from bitwright.kernels import gated_linear_attention_cost as cost

H100 = load_machine("h100-sxm").device()


def test_counts_by_hand():
    found = cost.gpu_work(1, 128, 2, 64, 64, chunk=64, sub=16, materialised=False)
    tokens = 128 * 2
    assert found.operations["matrix fp16"] == tokens * (4 * 64 * 64 + 2 * 24 * 64 + 2 * 32 * 64)
    assert found.operations["exponentials"] == tokens * (8 * 64 + 4 * 64)
    assert found.traffic["memory"] == tokens * (2 * 64 * 2 + 64 * 4 + 2 * 64 * 2)
    assert found.pieces == 2
    kept = cost.gpu_work(1, 128, 2, 64, 64)
    assert kept.traffic["memory"] - found.traffic["memory"] == tokens * 64 * 8 + 2 * (2 * 2 * 64 * 64 * 2)
    assert kept.pieces == 4
    softmax = cost.softmax_work(1, 128, 2, 64)
    assert softmax.operations["matrix fp16"] == 2 * 4 * (128 * 129 / 2) * 64


def test_linear_and_quadratic_time():
    linear = [cost.time_on(H100, cost.gpu_work(32, tokens, 16, 64, 64)).time_s for tokens in (8192, 16384)]
    softmax = [cost.time_on(H100, cost.softmax_work(32, tokens, 16, 64)).time_s for tokens in (8192, 16384)]
    assert linear[1] / linear[0] == pytest.approx(2, rel=0.01)
    assert softmax[1] / softmax[0] == pytest.approx(4, rel=0.01)


def test_few_heads_need_states_in_memory():
    shapes = [(batch, 8192, 16, 64, 64) for batch in (1, 64)]
    times = [[cost.time_on(H100, cost.gpu_work(*shape, materialised=kept)).time_s for kept in (True, False)]
             for shape in shapes]  # fmt: skip
    assert times[0][0] < times[0][1]  # one sequence: chunks in parallel win
    assert times[1][0] > times[1][1]  # many: writing states costs more than it brings


def test_crossover_and_bad_input():
    found = cost.crossover(H100, 32, 16, 64)
    assert found is not None
    assert 256 <= found <= 4096
    for bad in (
        lambda: cost.gpu_work(1, 128, 2, 64, 64, chunk=64, sub=24),
        lambda: cost.softmax_work(1, 0, 1, 64),
        lambda: cost.time_on(H100.model_copy(update={"cores": None}), cost.softmax_work(1, 1, 1, 1)),
    ):
        with pytest.raises(InputError):
            bad()
