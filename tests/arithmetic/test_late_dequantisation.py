"""Late dequantisation: integers exact, the float32 order fixed, equal to multiplying dequantised weights."""

import numpy as np
import pytest

from bitwright.arithmetic.late_dequantisation import (
    GroupedWeights,
    dequantisation_work,
    float_group_products,
    group_products,
    matmul,
    quantise_tokens,
    quantise_weights,
)
from bitwright.core.errors import InputError


def random_weights(rng, k, n, group):
    groups = -(-k // group)
    return GroupedWeights(
        rng.integers(0, 16, (k, n)).astype(np.uint8), rng.uniform(0.01, 1, (groups, n)).astype(np.float32),
        rng.integers(0, 16, (groups, n)).astype(np.uint8), 4, group,
    )  # fmt: skip


@pytest.mark.parametrize("group", [32, 64, 128, 200])
@pytest.mark.parametrize("m", [1, 17])
def test_int8_is_exact_up_to_the_scales(group, m):
    """K = 200 is a multiple of none but the last: the last group is short."""
    rng = np.random.default_rng(group + m)
    x, weights = rng.integers(-128, 128, (m, 200)).astype(np.int8), random_weights(rng, 200, 9, group)
    products, sums = group_products(x, weights)
    token = rng.uniform(0.1, 1, m).astype(np.float32)
    expected = np.zeros((m, 9), np.float32)
    for at, start in enumerate(range(0, 200, group)):
        part, codes = (
            x[:, start : start + group].astype(np.int64),
            weights.codes[start : start + group].astype(np.int64),
        )
        assert np.array_equal(products[at], part @ codes)
        assert np.array_equal(sums[at], part.sum(axis=1))
        integers = part @ (codes - weights.zero[at].astype(np.int64))
        assert np.array_equal(products[at] - weights.zero[at].astype(np.int64) * sums[at][:, None], integers)
        expected = expected + weights.scale[at] * integers.astype(np.float32)
    assert np.array_equal(matmul(x, weights, token), expected * token[:, None])


def test_widths_of_a_group_of_128():
    worst = np.full((1, 128), -128, np.int8)
    weights = GroupedWeights(np.full((128, 1), 15, np.uint8), np.ones((1, 1), np.float32),
                             np.full((1, 1), 15, np.uint8), 4, 128)  # fmt: skip
    products, sums = group_products(worst, weights)
    assert int(-products.min() - 1).bit_length() + 1 <= 19
    assert int(-sums.min() - 1).bit_length() + 1 <= 15


def test_half_precision_sums_in_order():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(3, 70)).astype(np.float16), random_weights(rng, 70, 5, 32)
    expected = np.zeros((3, 5), np.float32)
    for m in range(3):
        for n in range(5):
            for at, start in enumerate(range(0, 70, 32)):
                product = total = np.float32(0)
                for k in range(start, min(start + 32, 70)):
                    product = np.float32(product + np.float32(x[m, k]) * np.float32(weights.codes[k, n]))
                    total = np.float32(total + np.float32(x[m, k]))
                part = np.float32(product - np.float32(weights.zero[at, n]) * total)
                expected[m, n] = np.float32(expected[m, n] + weights.scale[at, n] * part)
    assert np.array_equal(matmul(x, weights), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_to_dequantised_weights(symmetric):
    rng = np.random.default_rng(1)
    w, x = rng.normal(0, 0.05, (384, 48)), rng.normal(size=(12, 384))
    weights = quantise_weights(w, group=128, symmetric=symmetric)
    codes, scale = quantise_tokens(x)
    expected = (codes * scale.astype(np.float64)[:, None]) @ weights.dequantise()
    found = matmul(codes, weights, scale)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(weights.dequantise() - w).max() <= weights.scale.max() * (1.0 if symmetric else 0.51)


def test_scales_that_fit_the_table_of_an_accelerator():
    w = np.random.default_rng(0).normal(0, 0.05, (100, 6))
    w[:32, 0] = 1e-9  # a scale below the smallest float16 number
    weights = quantise_weights(w, group=32, half_scales=True)
    assert np.array_equal(weights.scale.astype(np.float16), weights.scale)
    assert (weights.scale > 0).all()
    assert np.abs(weights.dequantise() - w).max() <= weights.scale.max() * 0.52
    with pytest.raises(InputError, match="beyond float16"):
        quantise_weights(w * 1e8, half_scales=True)
    with pytest.raises(InputError, match="do not divide"):
        quantise_weights(w, group=32, short_last_group=False)
    assert len(quantise_weights(w, group=50, short_last_group=False).scale) == 2


def test_work_crosses_at_the_group_size():
    for group in (32, 128):
        for m in (1, group - 1, group, group + 1, 4 * group):
            work = dequantisation_work(m, 64, 1024, group, zero_points=False)
            assert (work.late < work.classical_reused) == (m < group)
            assert work.late < work.classical
    assert dequantisation_work(1, 64, 1024, 128, zero_points=False).late * 128 == 64 * 1024


@pytest.mark.parametrize(
    "call",
    [
        lambda w: group_products(np.zeros((2, 8), np.int16), w), lambda w: group_products(np.zeros((2, 9), np.int8), w),
        lambda w: group_products(np.zeros((2, 8), np.float16), w), lambda w: matmul(np.zeros((2, 8), np.int8), w),
        lambda w: matmul(np.zeros((2, 8), np.int8), w, [1.0, np.nan]),
        lambda w: matmul(np.full((2, 8), np.nan, np.float16), w), lambda w: quantise_weights(np.full((2, 2), np.nan)),
        lambda w: quantise_weights(np.ones((2, 2)), bits=9), lambda w: quantise_weights(np.ones((2, 2)), group=0),
        lambda w: matmul(np.zeros((2, 8), np.int8), GroupedWeights(w.codes, w.scale, w.zero + 16, 4, 8), [1.0, 1.0]),
        lambda w: matmul(np.zeros((2, 8), np.int8), GroupedWeights(w.codes, w.scale * np.nan, w.zero, 4, 8), [1.0] * 2),
        lambda w: matmul(np.zeros((2, 8), np.int8), GroupedWeights(w.codes, w.scale[:, :2], w.zero, 4, 8), [1.0] * 2),
        lambda w: float_group_products(np.zeros((2, 8), np.int8), w), lambda w: dequantisation_work(0, 1, 1, 1),
    ],
)  # fmt: skip
def test_bad_input(call):
    with pytest.raises(InputError):
        call(quantise_weights(np.ones((8, 3)), group=8))
