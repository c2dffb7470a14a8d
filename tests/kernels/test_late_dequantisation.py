"""The kernel with packed 4-bit weights, bit for bit against the model and loosely against float64 products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import _native
from bitwright.arithmetic import late_dequantisation as model
from bitwright.arithmetic.late_dequantisation import GroupedWeights, quantise_weights
from bitwright.core.errors import InputError
from bitwright.kernels import threads as native_threads
from bitwright.kernels.late_dequantisation import PATHS, matmul, matmul_early, pack, work

HERE = PATHS[PATHS.index(_native.late_dequantisation_path()) :]


def operands(m, k, n, group, seed=0):
    rng = np.random.default_rng(seed)
    groups = -(-k // group)
    weights = GroupedWeights(
        rng.integers(0, 16, (k, n)).astype(np.uint8), rng.normal(0, 0.1, (groups, n)).astype(np.float32),
        rng.integers(0, 16, (groups, n)).astype(np.uint8), 4, group,
    )  # fmt: skip
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    return x, weights, (rng.random(m) + 0.1).astype(np.float32)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("group", [32, 64, 128, 1000])
@pytest.mark.parametrize("m", [1, 17])
def test_int8_bit_for_bit(path, group, m):
    """Rows, columns and groups that fill no tile; each step from int64 and numpy float32 alone."""
    x, weights, token = operands(m, 300, 75, group)
    total = np.zeros((m, 75), np.float32)
    for at, start in enumerate(range(0, 300, group)):
        centred = weights.codes[start : start + group].astype(np.int64) - weights.zero[at]
        total = total + weights.scale[at] * (x[:, start : start + group].astype(np.int64) @ centred).astype(np.float32)
    found = matmul(x, pack(weights), token, 1, path)
    assert np.array_equal(found, total * token[:, None])


@pytest.mark.parametrize("path", HERE)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 13), k=st.integers(1, 90), n=st.integers(1, 140), group=st.integers(1, 100), seed=st.integers(0, 9)
)
def test_as_the_model(path, m, k, n, group, seed):
    x, weights, token = operands(m, k, n, group, seed)
    half = np.random.default_rng(seed).normal(size=(m, k)).astype(np.float16)
    packed = pack(weights)
    assert np.array_equal(matmul(x, packed, token, 2, path), model.matmul(x, weights, token))
    assert np.array_equal(matmul(half, packed, None, 2, path), model.matmul(half, weights))
    expected = half.astype(np.float64) @ weights.dequantise()
    bound = np.abs(half.astype(np.float64)) @ np.abs(weights.dequantise())
    assert (np.abs(matmul_early(half, packed, 1, path) - expected) <= 1e-5 * bound + 1e-30).all()


@pytest.mark.parametrize("path", HERE)
def test_extreme_sums(path):
    codes = np.full((512, 16), 15, np.uint8)
    weights = GroupedWeights(codes, np.ones((1, 16), np.float32), np.full((1, 16), 15, np.uint8), 4, 512)
    x = np.full((3, 512), -128, np.int8)
    assert not matmul(x, pack(weights), np.ones(3), 1, path).any()
    top = GroupedWeights(codes, weights.scale, weights.zero * 0, 4, 512)
    assert (matmul(x, pack(top), np.ones(3), 1, path) == -128 * 15 * 512).all()


def test_the_longest_group():
    """2^19 products of the largest codes, and a zero point of 15 beside codes of 0, stay within int32; one more row is
    refused, however small its codes."""
    rows = 1 << 19
    codes = np.zeros((rows, 2), np.uint8)
    codes[:, 0] = 15
    weights = GroupedWeights(codes, np.ones((1, 2), np.float32), np.array([[0, 15]], np.uint8), 4, rows)
    x, expected = np.full((1, rows), -128, np.int8), np.array([[-15 * 128.0 * rows, 15 * 128.0 * rows]], np.float32)
    assert np.array_equal(matmul(x, pack(weights), np.ones(1, np.float32), 1), expected)
    longer = GroupedWeights(np.zeros((rows + 1, 1), np.uint8), np.ones((1, 1), np.float32), np.zeros((1, 1), np.uint8),
                            4, rows + 1)  # fmt: skip
    with pytest.raises(InputError, match=f"at most {rows} rows"):
        pack(longer)


def test_every_half_precision_number_times_every_code():
    """One product per group: the float32 product of both values."""
    every = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    weights = GroupedWeights(np.arange(16, dtype=np.uint8)[None], np.ones((1, 16), np.float32),
                             np.zeros((1, 16), np.uint8), 4, 1)  # fmt: skip
    found = matmul(every[:, None], pack(weights), threads=1)
    assert np.array_equal(found, every[:, None].astype(np.float32) * np.arange(16, dtype=np.float32))


def test_real_valued_weights_and_float32():
    rng = np.random.default_rng(0)
    w, x = rng.normal(0, 0.05, (384, 48)), rng.normal(size=(5, 384)).astype(np.float32)
    weights = quantise_weights(w, group=128)
    expected = x.astype(np.float64) @ weights.dequantise()
    assert np.abs(matmul(x, pack(weights)) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_bytes_and_work():
    packed = pack(operands(1, 4096, 64, 128)[1])
    assert packed.bytes == 4096 * 64 // 2
    found = work(3, packed)
    assert found.operations == {"matrix int8": 2 * 3 * 4096 * 64, "fp32": 2 * 3 * 32 * 64}
    assert found.traffic == {"memory": 4096 * 64 // 2 + 32 * 64 * 5 + 3 * 4096 + 4 * 3 * 64}
    assert found.pieces == 4


def test_a_path_this_cpu_has_not_warns_and_falls_back(monkeypatch):
    x, weights, token = operands(2, 40, 20, 16)
    expected = matmul(x, pack(weights), token)
    monkeypatch.setattr(_native, "late_dequantisation_path", lambda: "portable")
    native_threads._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="lacks"):
        assert np.array_equal(matmul(x, pack(weights), token, path="avx512"), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, t: matmul(x, pack(w)), "positive token scales"),
        (lambda x, w, t: matmul(x, pack(w), [1.0, np.nan]), "positive token scales"),
        (lambda x, w, t: matmul(x, pack(w), [1.0, -1.0]), "positive token scales"),
        (lambda x, w, t: matmul(x[:, :-1], pack(w), t), "do not meet"),
        (lambda x, w, t: matmul(x.astype(np.int16), pack(w)), "int8, float16"),
        (lambda x, w, t: matmul(x.astype(np.float32), pack(w), t), "no token scale"),
        (lambda x, w, t: matmul(np.full((2, 40), np.inf, np.float32), pack(w)), "NaN or infinity"),
        (lambda x, w, t: matmul(x, pack(w), t, path="gpu"), "Instruction sets of"),
        (lambda x, w, t: matmul(x, pack(w), t, threads=0), "at least one"),
        (lambda x, w, t: pack(GroupedWeights(w.codes, w.scale, w.zero + 16, 4, 16)), "zero point"),
        (lambda x, w, t: pack(GroupedWeights(w.codes + 16, w.scale, w.zero, 4, 16)), "code is outside"),
        (lambda x, w, t: pack(GroupedWeights(w.codes, w.scale * np.nan, w.zero, 4, 16)), "NaN"),
        (lambda x, w, t: pack(GroupedWeights(w.codes, w.scale[:1], w.zero, 4, 16)), "scales and zero points"),
        (lambda x, w, t: pack(GroupedWeights(w.codes, w.scale, w.zero, 5, 16)), "two codes"),
        (lambda x, w, t: work(0, pack(w)), "at least one"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(*operands(2, 40, 20, 16))
