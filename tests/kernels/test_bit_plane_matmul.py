"""Bit-plane products against integer products, on every path, form, layout and width."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.bit_plane_matmul import (
    PATHS,
    affine_matmul,
    from_signed,
    gpu_speed_up,
    matmul,
    pack,
    predict,
    tiling,
    unpack,
)

HERE = PATHS[PATHS.index(_native.bit_plane_path()) :]


def integers(codes, bits):
    """The odd integers of bipolar codes, bit by bit."""
    return sum((2 * ((codes.astype(np.int64) >> i) & 1) - 1) << i for i in range(bits))


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("q", range(1, 9))
def test_every_pair_of_widths(p, q):
    rng = np.random.default_rng(8 * p + q)
    for m, n, k in ((1, 1, 1), (17, 19, 256), (1, 5, 70), (6, 1, 513)):
        w, a = (rng.integers(0, 1 << bits, (rows, k)).astype(np.uint8) for bits, rows in ((p, m), (q, n)))
        expected = integers(w, p) @ integers(a, q).T
        assert np.array_equal(matmul(pack(w, p), pack(a, q)), expected)
        assert np.array_equal(matmul(pack(w, p), pack(a, q), form="and"), expected)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("layouts", [("plane", "plane"), ("blocked", "plane"), ("blocked", "blocked")])
@pytest.mark.parametrize("threads", [1, 3])
def test_paths_layouts_and_threads(path, layouts, threads):
    rng = np.random.default_rng(0)
    w, a = rng.integers(0, 4, (33, 1000)).astype(np.uint8), rng.integers(0, 8, (65, 1000)).astype(np.uint8)
    expected = integers(w, 2) @ integers(a, 3).T
    for form in ("xor", "and"):
        left, right = pack(w, 2, layouts[0], threads), pack(a, 3, layouts[1], threads)
        assert np.array_equal(matmul(left, right, threads, form, path), expected)


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
    assert planes.bytes == bits * rows * -(-k // 512) * 64


def test_signed_operands_with_zero_points():
    rng = np.random.default_rng(0)
    v, u = rng.integers(-8, 8, (9, 130)), rng.integers(-128, 128, (11, 130))
    w, a = from_signed(v, 4, 0.03, 0.2), from_signed(u, 8, 0.5, -1.25)
    assert np.array_equal(integers(w.codes, 4), 2 * v + 1)
    assert np.allclose(w.scale * integers(w.codes, 4) + w.offset, 0.03 * v + 0.2, rtol=1e-15)
    expected = (0.03 * v + 0.2) @ (0.5 * u - 1.25).T
    assert np.abs(affine_matmul(w, a) - expected).max() < 1e-6 * np.abs(expected).max()


def test_plans_count_what_is_packed():
    plan = tiling(33, 65, 1000, 2, 3)
    rng = np.random.default_rng(0)
    planes = [
        pack(rng.integers(0, 1 << bits, (rows, 1000)).astype(np.uint8), bits) for bits, rows in ((2, 33), (3, 65))
    ]
    assert plan.bytes_read == sum(each.bytes for each in planes)
    assert plan.steps * 512 == 33 * 65 * 1024 * 6
    found = predict(plan, 1e12, 1e9)
    assert (found.compute_s, found.memory_s) == (33 * 65 * 1024 * 6 / 1e12, (plan.bytes_read + 4 * 33 * 65) / 1e9)
    big = gpu_speed_up("RTX 3090", 4096, 4096, 4096, 2, 2)
    assert big["compute"] == pytest.approx(1.0)  # W2A2: four one-bit products at four times the int4 rate
    assert gpu_speed_up("RTX 3090", 4096, 1, 4096, 2, 2)["speed_up"] == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(np.zeros((2, 2), np.uint8), 9), "1 to 8 bits"),
        (lambda: pack(np.full((2, 2), 4, np.uint8), 2), "do not fit 2 bits"),
        (lambda: pack(np.zeros((2, 2), np.int64), 2), "uint8"),
        (lambda: pack(np.zeros((0, 2), np.uint8), 2), "at least one"),
        (lambda: pack(np.zeros((2, 2), np.uint8), 2, "rows"), "plane and blocked"),
        (lambda: matmul(pack(np.zeros((1, 2), np.uint8), 1), pack(np.zeros((1, 3), np.uint8), 1)), "k = 2 and 3"),
        (lambda: matmul(*[pack(np.zeros((1, 40000), np.uint8), 8)] * 2), "leave int32"),
        (lambda: matmul(*[pack(np.zeros((1, 2), np.uint8), 1)] * 2, path="gpu"), "this CPU has"),
        (lambda: from_signed([8], 4, 1.0), "signed integers of 4 bits"),
        (lambda: tiling(0, 1, 1, 1, 1), "not defined"),
        (lambda: gpu_speed_up("TPU", 1, 1, 1, 1, 1), "GPUs are"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
