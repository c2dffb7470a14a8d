"""Activations in 8, 4 and 2 bits: ranges, rounding, packing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.kernels.activation_quantisation import (
    GroupLayout,
    dequantise,
    group_layout,
    group_ranges,
    quantise,
)


def by_groups(x: torch.Tensor, layout: GroupLayout) -> np.ndarray:
    """(groups, values) in float64, without the kernel's own arithmetic."""
    rows = x.detach().float().numpy().astype(np.float64).reshape(-1, layout.groups, layout.inner)
    return rows.transpose(1, 0, 2).reshape(layout.groups, -1)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(3, 5, 24), (2, 4, 7, 9), (1, 12), (5, 12), (40, 4, 1, 70), (2, 4, 33)]),
    groups=st.sampled_from([1, 2, 4]), bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 1 << 40),
    threads=st.integers(1, 3), stochastic=st.booleans(),
)  # fmt: skip
def test_codes_are_those_of_the_formula(shape, groups, bits, seed, threads, stochastic):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 1000)) * 3 + 1
    groups = groups if shape[1 if len(shape) == 4 else -1] % groups == 0 else 1
    layout = group_layout(shape, groups)
    low, span = group_ranges(x, layout, threads)
    values = by_groups(x, layout)
    assert np.array_equal(low.numpy(), values.min(1).astype(np.float32))
    assert np.allclose(span.numpy(), np.ptp(values, axis=1), rtol=1e-6)
    kept = quantise(x, layout, low, span, bits, "stochastic" if stochastic else "nearest", seed, threads)
    restored = dequantise(kept, threads)
    assert restored.shape == x.shape
    steps = np.abs(by_groups(restored, layout) - values) / (span.numpy()[:, None] / (2**bits - 1))
    assert steps.max() <= (1.0 if stochastic else 0.5) + 1e-3
    exact = (values - low.numpy()[:, None]) / span.numpy()[:, None] * (2**bits - 1)
    codes = np.rint((by_groups(restored, layout) - low.numpy()[:, None]) / span.numpy()[:, None] * (2**bits - 1))
    assert np.all((codes >= 0) & (codes <= 2**bits - 1))
    assert np.all(np.abs(codes - exact) < (1.001 if stochastic else 0.501))
    assert kept.codes.numel() == x.numel() // layout.inner * -(-layout.inner * bits // 8)


def test_the_result_does_not_depend_on_threads_and_does_on_the_seed():
    x = torch.randn(64, 197, 96)
    layout = group_layout(x.shape, 3)
    ranges = group_ranges(x, layout)
    one, two = (quantise(x, layout, *ranges, seed=5, threads=threads).codes for threads in (1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, quantise(x, layout, *ranges, seed=6).codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_without_bias(bits):
    x = torch.rand(1, 4096) * 0.8 + 0.1
    layout, low, span = GroupLayout(1, 4096), torch.zeros(1), torch.ones(1)
    draws = 400
    mean = sum(dequantise(quantise(x, layout, low, span, bits, seed=seed)).double() for seed in range(draws)) / draws
    exact = x.double() * (2**bits - 1)
    fraction = exact - exact.floor()
    deviation = (fraction * (1 - fraction)).sqrt() / (2**bits - 1) / draws**0.5
    score = (mean - x.double()) / deviation.clamp_min(1e-9)
    assert abs(score.mean()) < 5 / 4096**0.5 * 1.2
    assert 0.9 < score.std() < 1.1


def test_values_outside_the_range_saturate():
    x = torch.tensor([[-100.0, -0.5, 0.25, 1.5, 300.0, 1e30]])
    kept = quantise(x, GroupLayout(1, 6), torch.zeros(1), torch.ones(1), 8, "nearest")
    assert kept.codes.tolist() == [0, 0, 64, 255, 255, 255]
    low, high = torch.tensor([-1.0]), torch.tensor([2.0])
    assert dequantise(quantise(x, GroupLayout(1, 6), low, high, 8)).abs().max() <= 1.0 + 1e-6


def test_a_constant_group_is_exact_and_nan_is_found():
    x = torch.full((2, 3, 8), 0.3)
    layout = group_layout(x.shape, 2)
    low, span = group_ranges(x, layout)
    assert torch.equal(dequantise(quantise(x, layout, low, span)), x)
    x[1, 2, 5] = float("nan")
    low, span = group_ranges(x, layout)
    assert low.isnan().tolist() == [False, True]
    with pytest.raises(InputError, match="finite"):
        quantise(x, layout, low, span)


def test_types_and_views_are_restored():
    x = torch.randn(4, 6, 10, dtype=torch.float64).transpose(1, 2)
    layout = group_layout(tuple(x.shape), 1)
    restored = dequantise(quantise(x, layout, *group_ranges(x, layout), rounding="nearest"))
    assert (restored.dtype, restored.shape) == (x.dtype, x.shape)
    assert (restored - x).abs().max() <= (x.max() - x.min()) / 255 * 0.51
    half = torch.randn(3, 8).bfloat16()
    layout = group_layout((3, 8), 2)
    assert dequantise(quantise(half, layout, *group_ranges(half, layout))).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: group_layout((4, 9), 2), "do not divide axis 1"),
        (lambda x: group_layout((2, 3, 4, 4), 2), "do not divide axis 1"),
        (lambda x: group_layout((2, 0), 1), "at least one"),
        (lambda x: group_layout((2, 4), 0), "at least one"),
        (lambda x: quantise(x, group_layout((4, 8), 1), torch.zeros(1), torch.ones(1), 3), "bits, not 3"),
        (lambda x: quantise(x, group_layout((4, 8), 1), torch.zeros(1), torch.ones(1), rounding="up"), "nearest"),
        (lambda x: quantise(x, group_layout((4, 8), 2), torch.zeros(1), torch.ones(1)), "do not fit 2 groups"),
        (lambda x: quantise(x, group_layout((4, 8), 1), torch.zeros(1), -torch.ones(1)), "not negative"),
        (lambda x: group_ranges(x.long(), group_layout((4, 8), 1)), "floating point"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.randn(4, 8))
