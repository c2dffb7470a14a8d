"""Bit-plane products against integer products, on every path, form, layout and width; fused rounding; predictions."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import _native
from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.bipolar import BipolarOperand, from_encoded, from_signed
from bitwright.core.errors import InputError
from bitwright.kernels import threads as native_threads
from bitwright.kernels.bit_plane_matmul import (
    PATHS,
    LinearWeights,
    affine_matmul,
    linear,
    matmul,
    pack,
    quantise,
    tiling,
    unpack,
)

HERE = PATHS[PATHS.index(_native.bit_plane_path()) :]
SHAPES = ((1, 1, 1), (17, 19, 256), (1, 5, 70), (6, 1, 513))


def integers(codes, bits):
    """The odd integers of bipolar codes, bit by bit."""
    return sum((2 * ((codes.astype(np.int64) >> i) & 1) - 1) << i for i in range(bits))


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("q", range(1, 9))
def test_every_pair_of_widths(p, q):
    rng = np.random.default_rng(8 * p + q)
    for m, n, k in SHAPES:
        w, a = (rng.integers(0, 1 << bits, (rows, k)).astype(np.uint8) for bits, rows in ((p, m), (q, n)))
        expected = integers(w, p) @ integers(a, q).T
        assert np.array_equal(matmul(pack(w, p), pack(a, q)), expected)
        assert np.array_equal(matmul(pack(w, p), pack(a, q), form="and"), expected)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("layouts", [("plane", "plane"), ("blocked", "plane"), ("blocked", "blocked")])
@pytest.mark.parametrize("threads", [1, 3])
def test_paths_layouts_and_threads(path, layouts, threads):
    rng = np.random.default_rng(0)
    for rows, columns, k, p, q in ((33, 65, 1000, 2, 3), (3, 7, 9000, 8, 7), (5, 260, 600, 1, 8)):
        w, a = (rng.integers(0, 1 << bits, (count, k)).astype(np.uint8) for bits, count in ((p, rows), (q, columns)))
        expected = integers(w, p) @ integers(a, q).T
        for form in ("xor", "and"):
            left, right = pack(w, p, layouts[0], threads), pack(a, q, layouts[1], threads)
            assert np.array_equal(matmul(left, right, threads, form, path), expected)


def test_many_steps_share_the_work_of_threads():
    """More steps than the grain of a thread, split by rows and by columns."""
    rng = np.random.default_rng(1)
    w, a = rng.integers(0, 4, (300, 2000)).astype(np.uint8), rng.integers(0, 4, (129, 2000)).astype(np.uint8)
    expected = integers(w, 2) @ integers(a, 2).T
    for left, right, wanted in ((w, a, expected), (a, w, expected.T)):
        assert np.array_equal(matmul(pack(left, 2), pack(right, 2), 2), wanted)


def test_extremes():
    for bits in (1, 8):
        most = np.full((2, 4000), (1 << bits) - 1, np.uint8)
        least = np.zeros((2, 4000), np.uint8)
        top = 4000 * ((1 << bits) - 1) ** 2
        assert (matmul(pack(most, bits), pack(most, bits)) == top).all()
        assert (matmul(pack(most, bits), pack(least, bits)) == -top).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 1100), st.sampled_from(["plane", "blocked"]))
def test_packing_comes_back(bits, rows, k, layout):
    codes = np.random.default_rng(k).integers(0, 1 << bits, (rows, k)).astype(np.uint8)
    planes = pack(codes, bits, layout)
    assert np.array_equal(unpack(planes), codes)
    padded = rows if layout == "plane" else -(-rows // 4) * 4
    assert planes.bytes == bits * padded * -(-k // 512) * 64


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 700), st.booleans(), st.sampled_from(["plane", "blocked"]))
def test_rounding_splits_as_the_format_does(bits, rows, k, vectors, layout):
    x = np.random.default_rng(k).normal(size=(rows, k)).astype(np.float32) * 3
    top = (1 << bits) - 1
    found = quantise(x, bits, layout=layout, vectors=vectors)
    scale = np.abs(x).max(axis=1) / np.float32(top)
    assert np.array_equal(found.scale, scale)
    codes = formats.elements.BipolarElement(bits).encode(x, scale)
    assert np.array_equal(unpack(found.planes), codes)
    assert np.array_equal(found.sums, integers(codes, bits).sum(axis=1))


def test_rounding_with_given_or_shared_scales_and_zeros():
    x = np.random.default_rng(0).normal(size=(4, 100)).astype(np.float32)
    x[2] = 0
    scale = np.array([0.5, 0.01, 1.0, 0.2], np.float32)
    codes = formats.elements.BipolarElement(3).encode(x, scale)
    assert np.array_equal(unpack(quantise(x, 3, scale).planes), codes)
    assert quantise(x, 3).scale[2] == 0  # no odd integer is zero
    assert np.array_equal(quantise(x, 3, share=0.5).scale[0], np.abs(x[0]).max() / np.float32(7) * np.float32(0.5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 600), st.integers(0, 99))
def test_signed_operands_with_zero_points(p, q, k, seed):
    rng = np.random.default_rng(seed)
    v, u = (rng.integers(-(1 << (b - 1)), 1 << (b - 1), (rows, k)) for b, rows in ((p, 9), (q, 11)))
    sv, su = rng.random((9, 1)) + 0.1, rng.random((11, 1)) + 0.1
    zv, zu = rng.normal(size=(9, 1)), rng.normal(size=(11, 1))
    w, a = from_signed(v, p, sv, zv), from_signed(u, q, su, zu)
    left, right = sv * v + zv, su * u + zu
    expected = left @ right.T
    assert np.abs(affine_matmul(w, a) - expected).max() <= 1e-6 * (np.abs(left) @ np.abs(right).T).max()


def test_linear_applies_scales_offsets_and_bias():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(37, 300)).astype(np.float32), rng.normal(size=(9, 300)).astype(np.float32)
    bias = rng.normal(size=37).astype(np.float32)
    offset = rng.normal(size=9).astype(np.float32)
    form = formats.parse("uint4/row")
    operand = from_encoded(form, form.encode(weight))
    acts = quantise(x, 6)
    real = acts.scale[:, None] * integers(unpack(acts.planes), 6) + offset[:, None]
    expected = real.astype(np.float64) @ operand.values.T + bias
    for threads, path in ((1, None), (2, "portable")):
        found = linear(LinearWeights.of(operand, bias), acts, offset, threads, path)
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-4)
    single = linear(LinearWeights.of(operand, bias), quantise(x[:1], 6))
    assert np.allclose(single, expected[:1] - offset[0] * operand.values.sum(axis=1), rtol=1e-4, atol=1e-4)


def test_results_into_a_given_array_and_no_planes_of_results():
    rng = np.random.default_rng(0)
    w, a = rng.integers(0, 4, (256, 512)).astype(np.uint8), rng.integers(0, 4, (300, 512)).astype(np.uint8)
    packed = pack(w, 2), pack(a, 2)
    tracemalloc.start()
    found = matmul(*packed, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * found.nbytes
    out = np.empty((256, 300), np.int32)
    assert matmul(*packed, out=out) is out
    assert np.array_equal(out, found)


def test_the_description_counts_what_is_packed_and_done():
    plan = tiling(33, 65, 1000, 2, 3)
    rng = np.random.default_rng(0)
    planes = [
        pack(rng.integers(0, 1 << bits, (rows, 1000)).astype(np.uint8), bits) for bits, rows in ((2, 33), (3, 65))
    ]
    assert [plan.weight_bytes, plan.activation_bytes] == [each.bytes for each in planes]
    assert plan.steps == 36 * 65 * 2 * 6
    assert plan.tiles == 9 * 17
    assert plan.bytes_written == 4 * 33 * 65
    wide = tiling(4096, 4096, 4096, 2, 2)
    assert wide.passes == 16  # columns of 2 planes of 512 bytes, 256 KB of them at once


def test_a_path_this_cpu_has_not_warns_and_falls_back(monkeypatch):
    codes = np.random.default_rng(0).integers(0, 2, (3, 600)).astype(np.uint8)
    expected = matmul(pack(codes, 1), pack(codes, 1))
    monkeypatch.setattr(_native, "bit_plane_path", lambda: "portable")
    native_threads._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="lacks the avx512"):
        assert np.array_equal(matmul(pack(codes, 1), pack(codes, 1)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(np.zeros((2, 2), np.uint8), 9), "1 to 8 bits"),
        (lambda: pack(np.full((2, 2), 4, np.uint8), 2), "do not fit 2 bits"),
        (lambda: pack(np.zeros((2, 2), np.int64), 2), "uint8"),
        (lambda: pack(np.zeros((0, 2), np.uint8), 2), "at least one"),
        (lambda: pack(np.zeros((2, 2), np.uint8), 2, "rows"), "plane and blocked"),
        (lambda: pack(np.zeros((4, 2), np.uint8).T, 2), "not contiguous"),
        (lambda: matmul(pack(np.zeros((1, 2), np.uint8), 1), pack(np.zeros((1, 3), np.uint8), 1)), "k = 2 and 3"),
        (lambda: matmul(*[pack(np.zeros((1, 40000), np.uint8), 8)] * 2), "leave int32"),
        (lambda: matmul(*[pack(np.zeros((1, 2), np.uint8), 1)] * 2, path="gpu"), "Instruction sets of"),
        (lambda: matmul(*[pack(np.zeros((1, 2), np.uint8), 1)] * 2, form="or"), "Forms are"),
        (lambda: matmul(*[pack(np.zeros((1, 2), np.uint8), 1)] * 2, threads=0), "at least one"),
        (
            lambda: matmul(*[pack(np.zeros((1, 2), np.uint8), 1)] * 2, out=np.zeros((2, 1), np.int32)),
            "takes the result",
        ),
        (lambda: quantise(np.full((1, 3), np.nan, np.float32), 2), "NaN or infinity"),
        (lambda: quantise(np.zeros((3, 2), np.float32).T, 2), "not contiguous"),
        (lambda: quantise(np.zeros((2, 3)), 2), "float32"),
        (lambda: quantise(np.zeros((2, 3), np.float32), 2, np.zeros(2, np.float32)), "positive numbers"),
        (lambda: quantise(np.zeros((2, 3), np.float32), 2, share=1.5), "at most 1"),
        (lambda: LinearWeights.of(BipolarOperand(np.zeros((2, 3), np.uint8), 1, np.ones(()), np.zeros(())),
                                  np.zeros(3, np.float32)), "2 outputs"),
        (lambda: tiling(0, 1, 1, 1, 1), "not defined"),
        (lambda: tiling(1, 1, 1, 1, 9), "1 to 8 bits"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
