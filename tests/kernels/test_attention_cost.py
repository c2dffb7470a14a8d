"""Counts of attention's tiles on a GPU."""

import pytest

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.attention_cost import AttentionShape, Gpu, backward_time, forward_time, gpu, rate

LONG = AttentionShape(1, 16384, 16, 128)


def test_blocks_of_queries_fill_the_gpu_and_heads_do_not():
    device = gpu("a100-80g")
    first, second = forward_time(LONG, device, "version 1"), forward_time(LONG, device)
    assert first > 5 * second  # 16 heads on 108 multiprocessors, and 2048 blocks
    many = AttentionShape(32, 512, 16, 128)
    assert forward_time(many, device, "version 1") < 3 * forward_time(many, device)


def test_a_bound_of_each_kind_decides():
    fast = Gpu(1, 1e30, 1e30, 1e30, 1e9)
    shape = AttentionShape(1, 256, 1, 128)
    assert forward_time(shape, fast) == pytest.approx(2 * 4 * 256 * 128 / 1e9)
    matrix = Gpu(1, 1e12, 1e30, 1e30, 1e30)
    assert forward_time(shape, matrix) == pytest.approx(4 * 256 * 256 * 128 / 1e12)
    assert backward_time(shape, matrix) == pytest.approx(10 * 256 * 256 * 128 / 1e12)
    other = Gpu(1, 1e30, 1e12, 1e30, 1e30)
    assert forward_time(shape, other) == pytest.approx((8 * 256 * 256 + 8 * 128 * 128) / 1e12)


def test_causal_tiles_are_about_half():
    device = gpu("a100-80g")
    causal = AttentionShape(1, 16384, 16, 128, causal=True)
    assert 0.5 < forward_time(causal, device) / forward_time(LONG, device) < 0.52
    assert rate(causal, device) < device.matrix_per_s


def test_bad_input():
    device = gpu("a100-80g")
    with pytest.raises(UnknownNameError, match="version 2"):
        forward_time(LONG, device, "version 3")
    with pytest.raises(InputError, match="channels"):
        backward_time(AttentionShape(1, 8, 1, 80), device)
