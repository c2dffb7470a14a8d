"""Merging partial attention: the laws it obeys, and equality with attention over all keys at once."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.kernels.attention_merge import merge
from bitwright.kernels.decode_attention import decode_attention


def attend(scores, values):
    """Output and logarithm of the sum, float64, of scores (rows, keys)."""
    if not scores.shape[1]:
        return np.zeros((len(scores), values.shape[1])), np.full(len(scores), -np.inf)
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    return weights @ values / weights.sum(1, keepdims=True), top[:, 0] + np.log(weights.sum(1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(0.1, 300), st.integers(0, 2**32 - 1))
def test_any_parts_give_the_whole(sizes, spread, seed):
    rng = np.random.default_rng(seed)
    keys = sum(sizes)
    scores, values = rng.normal(size=(3, keys)) * spread, rng.normal(size=(keys, 4))
    ends = np.cumsum(sizes)
    parts = [
        attend(scores[:, end - size : end], values[end - size : end]) for size, end in zip(sizes, ends, strict=True)
    ]
    whole = attend(scores, values)
    for order in (parts, parts[::-1], [merge(parts[:1]), merge(parts[1:] or [parts[0]])] if len(parts) > 1 else parts):
        for found, expected in zip(merge(order), whole, strict=True):
            assert np.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_laws():
    rng = np.random.default_rng(0)
    a, b, c = ((rng.normal(size=(2, 5)), rng.normal(size=2) * 50) for _ in range(3))
    for left, right in (
        (merge([a, b]), merge([b, a])),
        (merge([merge([a, b]), c]), merge([a, merge([b, c])])),
        (merge([a, (np.zeros((2, 5)), np.full(2, -np.inf))]), a),
    ):
        assert all(np.allclose(one, other, rtol=1e-12) for one, other in zip(left, right, strict=True))
    none = (np.zeros((2, 5)), np.full(2, -np.inf))
    out, total = merge([none, none])
    assert (out == 0).all()
    assert (total == -np.inf).all()


def test_equals_what_the_kernel_merges():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 32), torch.randn(1, 2, 300, 32), torch.randn(1, 2, 300, 32)
    cuts = [0, 7, 100, 101, 300]
    parts = [decode_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in pairwise(cuts)]
    found, expected = merge(parts), decode_attention(q, k, v, return_lse=True)
    assert all(torch.allclose(one, other, atol=2e-6) for one, other in zip(found, expected, strict=True))


def test_gradients_and_types():
    out = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda o, s: merge([(o[0], s[0]), (o[1], s[1])]), (out, lse))
    half = merge([(torch.ones(3, 4).half(), torch.zeros(3))] * 2)
    assert (half[0].dtype, half[1].dtype) == (torch.float16, torch.float32)


def test_bad_input():
    part = (np.zeros((2, 4)), np.zeros(2))
    for parts in ([], [part, (np.zeros((2, 5)), np.zeros(2))], [(np.zeros((2, 4)), np.zeros(3))]):
        with pytest.raises(InputError):
            merge(parts)
