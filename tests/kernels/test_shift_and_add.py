"""Native shift products and masked sums against int64 and float64 of numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.arithmetic.shift_and_add import masked_sums, shift_matmul, to_fixed_point
from bitwright.core.errors import InputError
from bitwright.kernels.shift_and_add import (
    PATHS,
    fixed_point,
    matadd,
    matadd_loop,
    matshift,
    matshift32,
    matshift_loop,
    pack_mask,
    pack_shifts,
    shift_linear,
    unpack_mask,
    usable_path,
)

HERE = PATHS[PATHS.index(usable_path()) :]
SHAPES = [(1, 1, 1), (16, 24, 16), (17, 33, 15), (33, 70, 47), (8, 129, 9)]


def by_terms(x, exponent, sign):
    """The definition, term by term in Python integers."""
    return [[sum(int(s) * (int(v) >> -int(p)) for v, p, s in zip(row, powers, signs, strict=True))
             for powers, signs in zip(exponent, sign, strict=True)] for row in x]  # fmt: skip


def weights(rng, n, k):
    return rng.integers(-14, 1, (n, k)).astype(np.int8), rng.integers(-1, 2, (n, k)).astype(np.int8)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("top", [1, 1 << 16, 1 << 31])
def test_shifts_equal_their_definition(path, m, k, n, top):
    rng = np.random.default_rng(m + k + n)
    x = rng.integers(-top, top, (m, k)).astype(np.int32)
    exponent, sign = weights(rng, n, k)
    expected = np.array(by_terms(x, exponent, sign))
    packed = pack_shifts(exponent, sign)
    for threads in (1, 2):
        assert np.array_equal(matshift(x, packed, threads, path), expected)
    assert np.array_equal(matshift(x, packed, 1, path, wide=True), expected)
    assert np.array_equal(shift_matmul(x, exponent.T, sign.T), expected)
    if top <= 1 << 16:
        assert np.array_equal(matshift32(x, packed, 2, path), expected)
        assert np.array_equal(matshift_loop(x, exponent, sign, 2), expected)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("power", range(-14, 1))
@pytest.mark.parametrize("sign", [-1, 1])
def test_every_exponent_on_the_extremes(path, power, sign):
    x = np.array([[-(1 << 31), (1 << 31) - 1, -1, 0, 1, -(1 << 14), 12345, -12345]], np.int32).T
    packed = pack_shifts(np.full((3, 1), power), np.array([[sign], [0], [-sign]]))
    shifted = x.astype(np.int64) >> -power
    assert np.array_equal(matshift(x, packed, 1, path), np.hstack([sign * shifted, 0 * shifted, -sign * shifted]))


def test_shifts_differ_from_powers_by_less_than_a_unit_per_term():
    rng = np.random.default_rng(0)
    x = rng.integers(-(1 << 20), 1 << 20, (40, 90)).astype(np.int32)
    exponent, sign = weights(rng, 30, 90)
    apart = matshift(x, pack_shifts(exponent, sign)) - x @ (sign * np.exp2(exponent)).T
    assert 0 < np.abs(apart).max() < 90
    positive = pack_shifts(exponent, np.ones_like(sign))
    assert (matshift(x, positive) <= x @ np.exp2(exponent.astype(float)).T).all()  # towards minus infinity


def test_work_for_two_threads():
    rng = np.random.default_rng(0)
    x = rng.integers(-(1 << 18), 1 << 18, (1000, 256)).astype(np.int32)
    exponent, sign = weights(rng, 300, 256)
    packed = pack_shifts(exponent, sign)
    expected = matshift_loop(x, exponent, sign, 1)
    assert np.array_equal(matshift(x, packed, 2), expected)
    assert np.array_equal(matshift(x, packed, 2, wide=True), expected)


def test_sums_that_leave_int32_are_kept_or_refused():
    x = np.full((2, 4), (1 << 31) - 1, np.int32)
    packed = pack_shifts(np.zeros((1, 4), int), np.ones((1, 4), int))
    assert matshift(x, packed).tolist() == [[4 * ((1 << 31) - 1)]] * 2
    for call in (lambda: matshift(x, packed, wide=False), lambda: matshift32(x, packed)):
        with pytest.raises(InputError, match="leave int32"):
            call()
    assert matshift(np.full((1, 4), 5), packed, wide=False).tolist() == [[20]]


@pytest.mark.parametrize("path", HERE)
def test_rounding_down_can_leave_int32(path):
    """Every shifted term may lie a unit below its real value: such sums leave int32 although the real ones do not."""
    exponent, sign = np.array([[0] + [-14] * 3], np.int8), np.ones((1, 4), np.int8)
    packed = pack_shifts(exponent, sign)
    magnitude = int((2**31 - 1) / packed.gain)
    assert packed.gain * magnitude < 2**31 < magnitude + 3 * -(-magnitude >> 14)
    x = np.full((1, 4), -magnitude, np.int32)
    assert matshift(x, packed, 1, path)[0, 0] == by_terms(x, exponent, sign)[0][0] < -(2**31)
    with pytest.raises(InputError, match="leave int32"):
        matshift32(x, packed, 1, path)
    with pytest.raises(InputError, match="leave int32"):
        matshift(x, packed, 1, path, wide=False)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("top", [(1 << 24) - 1, 1 << 24, 1 << 25, (1 << 31) - 1, 1 << 31, 1 << 40])
@pytest.mark.parametrize("sign", [-1, 1])
def test_long_sums_of_large_integers(path, top, sign):
    made = matadd(pack_mask(np.ones((3, 200), np.uint8)), np.full((200, 5), sign * top), 1, path)
    assert np.array_equal(made, np.full((3, 5), 200 * sign * top))


def test_weights_of_zeros():
    packed = pack_shifts(np.full((5, 3), -14), np.zeros((5, 3), int))
    assert not matshift(np.array([[-1, 2, 3]]), packed).any()


def test_fixed_point_and_a_layer():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=300) * 10.0 ** rng.integers(-6, 6, 300), [0.0, -0.0, -1e-9, 32768, -32769, 1e30]]
    )
    x = x.astype(np.float32)
    for bits in (0, 8, 16, 31):
        assert np.array_equal(fixed_point(x, bits), to_fixed_point(x, 32 - bits, bits))
    assert fixed_point(np.array([np.inf, -np.inf], np.float32)).tolist() == [(1 << 31) - 1, -(1 << 31)]
    x = rng.normal(size=(7, 20)).astype(np.float32)
    exponent, sign = weights(rng, 5, 20)
    bias = rng.normal(size=5).astype(np.float32)
    sums = by_terms(np.floor(x.astype(np.float64) * 65536).astype(np.int64), exponent, sign)
    expected = np.array(sums) / 65536 + bias
    packed = pack_shifts(exponent, sign)
    for path in HERE:
        assert np.array_equal(shift_linear(x, packed, bias, path=path), expected.astype(np.float32))
    far = (x * 2.0**14).astype(np.float32)  # sums leave int32
    sums = by_terms(
        np.floor(np.clip(far.astype(np.float64) * 65536, -(2.0**31), 2.0**31 - 1)).astype(np.int64), exponent, sign
    )
    for path in HERE:
        found = shift_linear(far, packed, path=path)
        assert np.array_equal(found, (np.array(sums) / 65536).astype(np.float32))


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (16, 3136, 32), (5, 63, 17), (40, 65, 16), (300, 16, 33), (3, 130, 8)]
)
def test_masked_sums_equal_matrix_products(path, batch, m, k, n):
    if k > 1000 and batch == (2, 3):
        batch = (2, 1)
    rng = np.random.default_rng(m + k + n)
    mask = rng.integers(0, 2, (*batch, m, k)).astype(np.uint8)
    packed = pack_mask(mask)
    assert np.array_equal(unpack_mask(packed), mask)
    assert packed.bytes == np.prod((*batch, m)) * -(-k // 64) * 8
    for kind, top in ((np.int8, 1 << 7), (np.int32, 1 << 20), (np.int32, 1 << 31), (np.int64, 1 << 50)):
        v = rng.integers(-top, top, (*batch, k, n)).astype(kind)
        assert np.array_equal(matadd(packed, v, 2, path), mask.astype(np.int64) @ v.astype(np.int64))
    v = rng.normal(size=(*batch, k, n)).astype(np.float32)
    exact, magnitude = mask @ v.astype(np.float64), mask @ np.abs(v).astype(np.float64)
    found = matadd(packed, v, 2, path)
    assert found.dtype == np.float32
    assert (np.abs(found - exact) <= 1e-6 * magnitude).all()
    assert np.abs(found - exact).max() <= 1e-6 * np.abs(exact).max()


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 80), depth=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_linear_order_equals_the_quadratic_order(tokens, depth, seed):
    rng = np.random.default_rng(seed)
    query, key = rng.integers(0, 2, (2, tokens, depth))
    v = rng.integers(-(1 << 20), 1 << 20, (tokens, depth))
    linear = matadd(pack_mask(query), matadd(pack_mask(key.T), v))
    assert np.array_equal(linear, (query @ key.T) @ v)
    assert np.array_equal(linear, masked_sums(query, masked_sums(key.T, v)))


def test_what_is_not_selected_is_not_added():
    v = np.array([[1.0], [np.nan], [np.inf], [2.0]], np.float32)
    found = matadd(pack_mask([[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0]]), v)
    assert found[0, 0] == 3
    assert np.isnan(found[1, 0])
    assert np.isposinf(found[2, 0])


def test_loops_for_the_comparison():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (2, 9, 40)).astype(np.uint8)
    v = rng.normal(size=(2, 40, 6)).astype(np.float32)
    assert np.allclose(matadd_loop(mask, v, 2), mask @ v.astype(np.float64), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_shifts([[-15]], [[1]]), "-14 to 0"),
        (lambda: pack_shifts([[1]], [[1]]), "-14 to 0"),
        (lambda: pack_shifts([[0]], [[2]]), "-1 to 1"),
        (lambda: pack_shifts([[0.5]], [[1]]), "integers"),
        (lambda: pack_shifts([[0, 0]], [[1]]), "outputs, inputs"),
        (lambda: matshift([[1.5]], pack_shifts([[0]], [[1]])), "to_fixed_point"),
        (lambda: matshift([[1, 2]], pack_shifts([[0]], [[1]])), "1 inputs"),
        (lambda: matshift([[1 << 31]], pack_shifts([[0]], [[1]])), "int32"),
        (lambda: matshift([[1]], pack_shifts([[0]], [[1]]), threads=0), "threads"),
        (lambda: matshift([[1]], pack_shifts([[0]], [[1]]), path="avx1024"), "avx1024"),
        (lambda: fixed_point(np.array([np.nan], np.float32)), "NaN"),
        (lambda: fixed_point(np.zeros(3)), "float32"),
        (lambda: shift_linear(*np.zeros((1, 1, 1), np.float32), pack_shifts([[0]], [[1]]), np.zeros(2, "f4")), "bias"),
        (lambda: pack_mask([[2]]), "0 and 1"),
        (lambda: pack_mask([1, 0]), "m, k"),
        (lambda: matadd(pack_mask([[1, 0]]), [[1]]), "do not select"),
        (lambda: matadd(pack_mask([[1]]), [[1.0]]), "float64"),
        (lambda: matshift_loop(np.zeros((1, 2), np.int32), *np.zeros((2, 1, 1), np.int8)), "expected"),
        (lambda: matadd_loop(np.zeros((1, 1, 2), np.uint8), np.zeros((1, 1, 1), np.float32)), "expected"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
