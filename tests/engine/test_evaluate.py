"""Exact evaluation of every dataflow, sequence, width and encoding against numpy's integer product."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError
from bitwright.engine.baselines import gemm
from bitwright.engine.evaluate import run, wrap
from bitwright.engine.transformations import apply

PARALLEL = [
    (dataflow, sequence)
    for dataflow in ("os", "ws", "cube", "tree", "matrix2d")
    for sequence in ((), ("opt1",), ("opt2",))
]
SERIAL = [(dataflow, (name,)) for dataflow in ("os", "matrix2d") for name in ("opt3", "opt4c", "opt4e")]
ENCODINGS = ["mbe", "ent", "csd", "twos-complement", "sign-magnitude"]


def make(dataflow, sequence=(), encoding="mbe", a_bits=8, b_bits=8, accumulator_bits=None):
    depth = 1 if dataflow in ("os", "matrix2d") else 4
    bits = accumulator_bits or a_bits + b_bits + 12
    nest = gemm(dataflow, 1 if dataflow in ("ws", "tree") else 3, 2, depth, a_bits, b_bits, bits, encoding)
    return apply(nest, *sequence)


def operands(rng, m, k, n, a_bits=8, b_bits=8):
    return (
        rng.integers(-(1 << (a_bits - 1)), 1 << (a_bits - 1), (m, k)),
        rng.integers(-(1 << (b_bits - 1)), 1 << (b_bits - 1), (k, n)),
    )


@pytest.mark.parametrize("free", [(), ("sign_free",)])
@pytest.mark.parametrize(("dataflow", "sequence"), PARALLEL + SERIAL)
def test_equals_the_integer_product(dataflow, sequence, free):
    nest, rng = make(dataflow, sequence + free), np.random.default_rng(1)
    for shape in ((1, 1, 1), (7, 5, 3), (36, 98, 47)):
        a, b = operands(rng, *shape)
        np.testing.assert_array_equal(run(nest, a, b), a @ b)
    for low, high in ((-128, -128), (-128, 127), (127, 127)):
        a, b = np.full((5, 33), low), np.full((33, 3), high)
        np.testing.assert_array_equal(run(nest, a, b), a @ b)


@pytest.mark.parametrize(("a_bits", "b_bits"), [(4, 4), (6, 6), (16, 16), (4, 8)])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("sequence", [(), ("opt1",), ("opt2", "sign_free"), ("opt4c",), ("opt4e", "sign_free")])
def test_widths_and_encodings(sequence, encoding, a_bits, b_bits):
    nest = make("os", sequence, encoding, a_bits, b_bits)
    a, b = operands(np.random.default_rng(2), 6, 11, 5, a_bits, b_bits)
    a[0], b[:, 0] = -(1 << (a_bits - 1)), -(1 << (b_bits - 1))
    np.testing.assert_array_equal(run(nest, a, b), a @ b)


@pytest.mark.parametrize("sequence", [(), ("opt1", "sign_free"), ("carry_in_negation",)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_pair_of_int8(sequence, encoding):
    values = np.arange(-128, 128)
    got = run(make("os", sequence, encoding), values[:, None], values[None, :])
    np.testing.assert_array_equal(got, np.multiply.outer(values, values))


@pytest.mark.parametrize("dataflow", ["os", "ws", "cube", "tree"])
def test_opaque_product(dataflow):
    a, b = operands(np.random.default_rng(3), 7, 9, 5)
    np.testing.assert_array_equal(run(make(dataflow, encoding=None), a, b), a @ b)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(), ("opt1",), ("opt1", "sign_free")]),
    st.sampled_from(ENCODINGS),
    st.integers(16, 20),
    st.integers(0, 2**32),
)
def test_wraps_modulo_the_accumulator(sequence, encoding, bits, seed):
    a, b = operands(np.random.default_rng(seed), 3, 60, 2)
    a[:1], b[:, :1] = -128, -128
    expected = (a @ b + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    nest = make("os", sequence, encoding, accumulator_bits=bits)
    np.testing.assert_array_equal(run(nest, a, b, modular=True), expected)


@given(st.integers(-(2**62), 2**62), st.integers(1, 64))
def test_wrap(value, bits):
    assert int(wrap(value, bits)) == (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    if bits < 63:
        assert int(wrap(value, bits, signed=False)) == value % (1 << bits)


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
        run(make("os"), a, b)


def test_padding_can_be_forbidden():
    a, b = operands(np.random.default_rng(0), 2, 6, 2)
    with pytest.raises(InputError, match="K = 6 is not a multiple of 4"):
        run(make("os", ("opt2",)), a, b, pad=False)
    np.testing.assert_array_equal(run(make("os", ("opt1",)), a, b, pad=False), a @ b)
