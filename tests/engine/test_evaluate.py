"""Exact evaluation against numpy's integer product, and the register-by-register array against both."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.engine.evaluate import evaluate, operand_streams, operate, wrap
from bitwright.engine.systolic import SystolicArray, cycles

VARIANTS = [
    ("multiply-accumulate", "booth", "mbe"),
    ("multiply-accumulate", "tool", "mbe"),
    ("compressed-accumulation", "booth", "mbe"),
    ("compressed-accumulation", "booth", "ent"),
    ("compressed-accumulation", "booth", "csd"),
    ("compressed-accumulation", "booth", "twos-complement"),
    ("multiply-accumulate", "booth", "csd"),
]


def make(variant, rows=4, columns=3, **widths):
    element, multiplier, encoding = variant
    return SystolicArray(rows, columns, element, multiplier=multiplier, encoding=encoding, **widths)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (36, 98, 47)])
def test_equals_the_integer_product(variant, shape):
    m, k, n = shape
    rng = np.random.default_rng(m)
    a, b = rng.integers(-128, 128, (m, k), np.int8), rng.integers(-128, 128, (k, n), np.int8)
    np.testing.assert_array_equal(evaluate(make(variant), a, b), a.astype(np.int64) @ b.astype(np.int64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("extremes", [(-128, -128), (-128, 127), (127, 127)])
def test_extreme_operands(variant, extremes):
    a, b = np.full((5, 33), extremes[0]), np.full((33, 5), extremes[1])
    np.testing.assert_array_equal(evaluate(make(variant), a, b), a @ b)


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_every_pair_of_int8(variant):
    values = np.arange(-128, 128)
    got = evaluate(make(variant, 256, 256), values[:, None], values[None, :])
    np.testing.assert_array_equal(got, np.multiply.outer(values, values))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(VARIANTS), st.sampled_from([2, 4, 6, 8, 12, 16]), st.sampled_from([2, 3, 4, 8, 16]),
    st.integers(0, 32), st.integers(0, 2**32),
)  # fmt: skip
def test_wraps_modulo_the_accumulator(variant, a_bits, b_bits, extra, seed):
    bits = min(64, a_bits + b_bits + extra % 5)
    rng = np.random.default_rng(seed)
    a = rng.integers(-(1 << (a_bits - 1)), 1 << (a_bits - 1), (3, 40))
    b = rng.integers(-(1 << (b_bits - 1)), 1 << (b_bits - 1), (40, 2))
    array = make(variant, a_bits=a_bits, b_bits=b_bits, accumulator_bits=bits)
    exact = [[int(sum(int(x) * int(y) for x, y in zip(row, column, strict=True))) for column in b.T] for row in a]
    expected = [[(c + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1)) for c in row] for row in exact]
    assert evaluate(array, a, b).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(VARIANTS[:3]), st.integers(1, 5), st.integers(1, 5), st.integers(1, 11), st.integers(1, 9),
    st.integers(1, 11), st.integers(0, 2**32),
)  # fmt: skip
def test_the_array_register_by_register(variant, rows, columns, m, k, n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-128, 128, (m, k)), rng.integers(-128, 128, (k, n))
    trace = operate(make(variant, rows, columns), a, b)
    np.testing.assert_array_equal(trace.result, a @ b)
    assert trace.cycles == cycles(make(variant, rows, columns), m, n, k)


def test_operand_streams_pass_through_every_element():
    rng = np.random.default_rng(3)
    array = make(VARIANTS[2], 3, 4)
    a, b = rng.integers(-128, 128, (3, 6)), rng.integers(-128, 128, (6, 4))
    streams = operand_streams(array, a, b)
    assert sorted(streams) == ["a_in", "b_in", "c_in", "drain_in", "s_in"]
    total = int(cycles(array, 3, 4, 6))
    for row in range(3):
        for column in range(4):
            assert streams["a_in"].shape == (total, 3, 4)
            start = row + column
            assert streams["a_in"][start : start + 6, row, column].tolist() == a[row].tolist()
            assert streams["b_in"][start : start + 6, row, column].tolist() == b[:, column].tolist()
            assert streams["drain_in"][:, row, column].sum() == row + 1
    assert not streams["s_in"][:, 0].any()  # zeros enter at the north


@given(st.integers(-(2**62), 2**62), st.integers(1, 64))
def test_wrap(value, bits):
    assert int(wrap(value, bits)) == (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((2, 3), int), "Expected operands"),
        (np.zeros((2, 0), int), np.zeros((0, 3), int), "extents >= 1"),
        (np.zeros((2, 3)), np.zeros((3, 2)), "quantise first"),
        (np.full((2, 3), 128), np.zeros((3, 2), int), "8 bits hold -128 to 127"),
    ],
)
def test_bad_operands(a, b, message):
    with pytest.raises(InputError, match=message):
        evaluate(SystolicArray(2, 2), a, b)


def test_weight_stationary_arrays_are_not_operated():
    with pytest.raises(InputError, match="output-stationary"):
        operate(SystolicArray(2, 2, dataflow="ws"), np.ones((1, 1), int), np.ones((1, 1), int))
