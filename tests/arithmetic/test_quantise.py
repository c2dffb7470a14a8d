"""Integer quantisation against a scalar reference in exact rational arithmetic, numpy against torch, and bad input."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitwright.arithmetic.quantise import Quantised, quantise_asymmetric, quantise_symmetric, quantise_with
from bitwright.core.errors import InputError

REALS = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-6),
)
BITS = st.integers(2, 16)
PARTS = [{}, {"axis": 0}, {"axis": -1}, {"axis": (0, 1)}]


def broadcast_scale(x: np.ndarray, q: Quantised) -> np.ndarray:
    scale = np.repeat(q.scale, q.group, axis=-1) if q.group else q.scale
    return np.broadcast_to(scale, x.shape)


@given(REALS, BITS, st.sampled_from(PARTS))
def test_symmetric_codes_are_the_nearest_multiples_of_the_scale(x: np.ndarray, bits: int, part: dict) -> None:
    q = quantise_symmetric(x, bits, **part)
    top = 2 ** (bits - 1) - 1
    for value, code, scale in zip(x.flat, q.codes.flat, broadcast_scale(x, q).flat, strict=True):
        exact = Fraction(float(value)) / Fraction(float(scale))
        assert abs(exact - int(code)) <= Fraction(1, 2) + Fraction(1, 10**9)
        assert -top <= code <= top


@given(REALS, BITS)
def test_the_largest_value_of_every_channel_gets_the_largest_code(x: np.ndarray, bits: int) -> None:
    q = quantise_symmetric(x, bits, axis=0)
    for channel, codes, scale in zip(x, q.codes, q.scale, strict=True):
        if channel.any():
            assert abs(codes.astype(int)).max() == 2 ** (bits - 1) - 1
        else:
            assert not codes.any()
            assert scale.item() == 1


@given(REALS, BITS, st.sampled_from(PARTS), st.booleans())
def test_asymmetric_error_is_within_one_step_and_zero_is_exact(
    x: np.ndarray, bits: int, part: dict, signed: bool
) -> None:
    q = quantise_asymmetric(x, bits, signed=signed, **part)
    low = -(2 ** (bits - 1)) if signed else 0
    assert q.codes.min() >= low
    assert q.codes.max() <= low + 2**bits - 1
    # Half a step of rounding, plus at most half a step where the rounded zero point makes the end saturate.
    assert np.all(np.abs(q.dequantise() - x) <= broadcast_scale(x, q) * (1 + 1e-9))
    assert not q.dequantise()[x == 0].any()


@given(st.integers(1, 4), st.integers(1, 5), BITS, st.integers(0, 2**32 - 1))
def test_a_group_is_quantised_like_a_tensor_of_its_own(groups: int, size: int, bits: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(3, groups * size))
    for function in (quantise_symmetric, quantise_asymmetric):
        q = function(x, bits, group=size)
        assert q.scale.shape == (3, groups)
        for row in range(3):
            for index in range(groups):
                part = slice(index * size, (index + 1) * size)
                alone = function(x[row, part], bits)
                assert np.array_equal(q.codes[row, part], alone.codes)
                assert np.array_equal(q.dequantise()[row, part], alone.dequantise())


@pytest.mark.parametrize("part", [*PARTS, {"group": 4}])
@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_torch_gives_the_same_codes_as_numpy(part: dict, bits: int) -> None:
    x = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    x[2] = 0
    for function, options in [
        (quantise_symmetric, {}),
        (quantise_symmetric, {"full_range": True}),
        (quantise_asymmetric, {}),
        (quantise_asymmetric, {"signed": True}),
    ]:
        ours, theirs = function(x, bits, **part, **options), function(torch.from_numpy(x), bits, **part, **options)
        assert isinstance(theirs.codes, torch.Tensor)
        assert np.array_equal(ours.codes, theirs.codes.numpy())
        assert ours.codes.dtype == theirs.codes.numpy().dtype
        assert np.array_equal(ours.scale, theirs.scale.numpy())
        assert np.array_equal(ours.dequantise(), theirs.dequantise().numpy())


def test_agrees_with_the_quantiser_of_torch() -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    q = quantise_symmetric(x, axis=0)
    peer = torch.quantize_per_channel(x, q.scale.flatten(), torch.zeros(5, dtype=torch.int64), 0, torch.qint8)
    assert torch.equal(peer.int_repr(), q.codes)


def test_full_range_reaches_the_most_negative_code() -> None:
    q = quantise_symmetric(np.array([-2.0, 1.0]), 8, full_range=True)
    assert q.codes.tolist() == [-128, 64]
    assert quantise_symmetric(np.array([-2.0, 1.0]), 8).codes.tolist() == [-127, 64]  # 63.5 rounds to even


def test_a_known_scale_saturates() -> None:
    assert quantise_with(np.array([-9.0, 0.2, 9.0]), np.float64(0.1), 4).codes.tolist() == [-7, 2, 7]


def test_extreme_ranges_do_not_overflow_or_divide_by_zero() -> None:
    wide = quantise_asymmetric(np.array([3e38, -3e38], np.float32))
    assert wide.codes.tolist() == [255, 0]
    assert np.isfinite(wide.scale)
    tiny = quantise_symmetric(np.array([1e-45], np.float32))
    assert np.isfinite(tiny.dequantise()).all()


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.array([np.nan, 1.0]), {}, "1 NaN and 0 infinite"),
        (torch.tensor([float("inf"), 1.0]), {}, "0 NaN and 1 infinite"),
        (np.zeros((0, 3)), {}, "empty tensor"),
        (np.ones(3), {"bits": 1}, "2 to 16"),
        (np.ones(3), {"bits": 17}, "2 to 16"),
        (np.ones((2, 6)), {"group": 4}, "do not divide"),
        (np.ones((2, 6)), {"group": 0}, "do not divide"),
        (np.ones((2, 6)), {"axis": 2}, "not an axis"),
        (np.ones((2, 6)), {"axis": 0, "group": 3}, "not both"),
        ([1.0, 2.0], {}, "numpy array or a torch tensor"),
    ],
)
def test_bad_input_is_refused_by_name(x: object, options: dict, message: str) -> None:
    for function in (quantise_symmetric, quantise_asymmetric):
        with pytest.raises(InputError, match=message):
            function(x, **options)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InputError, match="positive and finite"):
        quantise_with(np.ones(2), np.array([1.0, 0.0]))
