"""Packing of sequences and one-pass operators on packed rows, against numpy and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bitwright.core.errors import InputError
from bitwright.kernels.packed_sequences import (
    attention,
    bias_gelu_,
    packing,
    packing_of_lengths,
    residual_norm,
)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7), extra=st.integers(0, 3), seed=st.integers(0, 99))
def test_packing_is_that_of_numpy(lengths, extra, seed):
    longest = max(lengths) + extra
    plan = packing_of_lengths(torch.tensor(lengths), longest)
    assert plan.offsets.tolist() == [0, *np.cumsum(lengths)]
    expected = [b * longest + i for b, length in enumerate(lengths) for i in range(length)]
    assert plan.index.tolist() == expected
    assert plan.tokens == sum(lengths)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(lengths), longest, 3)))
    rows = plan.pack(x)
    assert torch.equal(rows, x.reshape(-1, 3)[expected])
    padded = plan.unpack(rows)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    assert torch.equal(padded[real], x[real])
    assert (padded[~real] == 0).all()


def test_masks_with_holes_are_packed_where_they_are_true():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    plan = packing(mask)
    assert plan.index.tolist() == [0, 2, 7, 8]
    assert plan.offsets.tolist() == [0, 2, 2, 4]
    assert plan.share == pytest.approx(4 / 9)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (129, 384), (40, 100)])
def test_residual_and_normalisation_in_one_pass(rows, width, threads):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, width, generator=generator) * 3 + 1 for _ in range(2))
    bias, gain, shift = (torch.randn(width, generator=generator) for _ in range(3))
    found = residual_norm(x, bias, residual, gain, shift, 1e-5, threads=threads)
    whole = (x.double() + bias.double()) + residual.double()
    exact = functional.layer_norm(whole, (width,), gain.double(), shift.double(), 1e-5)
    assert (found - exact).abs().max() < 3e-6 * max(1, float(exact.abs().max()))


def test_the_last_normalisation_restores_the_batch():
    plan = packing_of_lengths(torch.tensor([2, 0, 3]), 4)
    x, residual = torch.randn(5, 8), torch.randn(5, 8)
    one, zero = torch.ones(8), torch.zeros(8)
    found = residual_norm(x, zero, residual, one, zero, 1e-5, plan)
    assert found.shape == (3, 4, 8)
    assert torch.equal(found, plan.unpack(residual_norm(x, zero, residual, one, zero, 1e-5)))


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_of_a_sum_is_within_a_millionth(form):
    x = torch.cat((torch.linspace(-14, 14, 9001), torch.tensor([0.0, -0.0, 1e-30, -80.0, 80.0]))).view(2, -1)
    bias = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0)) * 0.1
    exact = functional.gelu(x.double() + bias.double(), approximate=form)
    error = (bias_gelu_(x.clone(), bias, form) - exact).abs()
    assert (error < 1e-6 * exact.abs().clamp_min(1)).all()
    assert bias_gelu_(torch.full((1, 3), float("nan")), torch.zeros(3), form).isnan().all()


def test_attention_stays_within_sequences():
    lengths = [5, 0, 1, 33]
    offsets = packing_of_lengths(torch.tensor(lengths)).offsets
    q, k, v = (torch.randn(39, 3, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found = attention(q, k, v, offsets)
    for begin, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        for head in range(3):
            part = (each[begin:end, head].double().numpy() for each in (q, k, v))
            queries, keys, values = part
            scores = np.exp(queries @ keys.T / 4)
            expected = scores / scores.sum(1, keepdims=True) @ values if end > begin else values
            assert np.allclose(found[begin:end, head].numpy(), expected, atol=2e-6)


ROWS, LINE = torch.zeros(4, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing(torch.ones(2, 3)), "bool"),
        (lambda: packing(torch.ones(3, dtype=torch.bool)), "bool"),
        (lambda: packing_of_lengths(torch.tensor([3, -1])), "expected 0 to 3"),
        (lambda: packing_of_lengths(torch.tensor([5]), 4), "expected 0 to 4"),
        (lambda: packing_of_lengths(torch.tensor([1.5])), "whole numbers"),
        (lambda: packing_of_lengths(torch.tensor([2])).pack(torch.zeros(2, 2)), "does not fit"),
        (lambda: packing_of_lengths(torch.tensor([2])).unpack(torch.zeros(3, 2)), "do not fit"),
        (lambda: attention(*[torch.zeros(4, 2, 8)] * 3, torch.tensor([0, 5, 4])), "does not rise"),
        (lambda: attention(*[torch.zeros(4, 2, 8)] * 3, torch.tensor([0, 3])), "does not rise"),
        (lambda: attention(*[torch.zeros(4, 16)] * 3, torch.tensor([0, 4])), "tokens, heads"),
        (lambda: bias_gelu_(torch.zeros(4, 8).T, torch.zeros(4)), "contiguous"),
        (lambda: bias_gelu_(ROWS.double(), LINE), "float32"),
        (lambda: bias_gelu_(ROWS.clone(), LINE, "erf"), "approximate"),
        (lambda: residual_norm(ROWS, LINE, ROWS[:2], LINE, LINE), "one shape"),
        (lambda: residual_norm(ROWS, LINE[:3], ROWS, LINE, LINE), "vectors"),
        (
            lambda: residual_norm(ROWS, LINE, ROWS, LINE, LINE, restore=packing_of_lengths(torch.tensor([3]))),
            "3 tokens",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
