"""Bipolar integers: every code, the way from signed integers, and what a converted tensor stands for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats import bipolar
from bitwright.core.errors import InputError


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code(bits):
    codes = np.arange(1 << bits)
    bit_by_bit = sum((2 * ((codes >> i) & 1) - 1) << i for i in range(bits))
    assert np.array_equal(bipolar.decode(codes, bits), bit_by_bit)
    assert sorted(bit_by_bit) == list(range(-(1 << bits) + 1, 1 << bits, 2))
    assert np.array_equal(bipolar.encode(bit_by_bit, bits), codes)
    assert np.array_equal(formats.parse(f"bipolar{bits}").integers(codes.astype(np.uint8)), bit_by_bit)


@pytest.mark.parametrize("bits", range(1, 9))
def test_signed_integers_flip_the_top_bit(bits):
    v = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    found = bipolar.from_signed(v, bits, 0.375, -3.0)
    pattern = v & ((1 << bits) - 1)
    assert np.array_equal(found.codes, pattern ^ (1 << (bits - 1)))
    assert np.array_equal(bipolar.decode(found.codes, bits), 2 * v + 1)
    assert np.array_equal(found.values, 0.375 * v - 3.0)  # exact in float64: scale and zero are short binary fractions


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.floats(1e-6, 1e3), st.floats(-100, 100), st.integers(0, 1000))
def test_converted_tensors_stand_for_the_same(bits, scale, zero, seed):
    rng = np.random.default_rng(seed)
    v = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (3, 40))
    rows = np.array([[scale], [2 * scale], [scale / 3]])
    found = bipolar.from_signed(v, bits, rows, zero)
    assert np.allclose(found.values, rows * v + zero, rtol=1e-13, atol=1e-13 * (abs(zero) + scale * 256))


@pytest.mark.parametrize(
    "name", ["int4/row", "int8/tensor", "uint4/row", "uint3/tensor", "bipolar2/row", "bipolar8/tensor"]
)
def test_tensors_of_integer_formats_keep_their_values(name):
    x = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    form = formats.parse(name)
    encoded = form.encode(x)
    found = bipolar.from_encoded(form, encoded)
    assert found.bits == form.code_bits
    assert np.allclose(found.values, form.decode(encoded), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bipolar.encode([2], 4), "odd and within"),
        (lambda: bipolar.encode([17], 4), "odd and within"),
        (lambda: bipolar.encode([1.0], 4), "float64"),
        (lambda: bipolar.decode([4], 2), "0 to 3"),
        (lambda: bipolar.decode([0], 9), "1 to 8 bits"),
        (lambda: bipolar.from_signed([8], 4, 1.0), "-8 to 7"),
        (lambda: bipolar.from_signed([], 4, 1.0), "-8 to 7"),
        (lambda: bipolar.from_signed([0], 0, 1.0), "1 to 8 bits"),
        (lambda: bipolar.from_encoded(formats.parse("int4/8"), formats.parse("int4/8").encode(np.ones((2, 32)))),
         "one scale per row"),
        (lambda: bipolar.from_encoded(formats.parse("fp8_e4m3"), formats.parse("fp8_e4m3").encode(np.ones((2, 3)))),
         "int, uint or bipolar"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
