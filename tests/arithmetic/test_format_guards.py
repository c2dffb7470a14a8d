"""What every number format must refuse or survive: zeros, extremes, damaged bytes, impossible names."""

import numpy as np
import pytest
import torch

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats import base
from bitwright.arithmetic.formats.base import Encoded
from bitwright.arithmetic.formats.integer import AsymmetricInteger
from bitwright.arithmetic.formats.outlier_victim import OutlierVictimPairs
from bitwright.arithmetic.formats.scaled import Scaled
from bitwright.core.errors import InputError

NAMES = (
    "int8/row", "int4/32", "int2/tensor", "uint4/16", "bipolar1/row", "bipolar4/32", "bipolar8/tensor", "shift3/row",
    "shift6/16", "fp8_e4m3/row", "fp8_e5m2/none", "fp4_e2m1/8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp4", "mxint8",
    "bfp12_16", "ovp4/row", "ovp8/32", "ovp4_unsigned/row", "int4/32,fp16", "lmul_e4m3/row",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_stay_zero_and_have_no_error(name):
    form = formats.parse(name)
    x = np.zeros((3, 40), np.float32)
    assert (formats.fake_quantise(form, x) == 0).all()
    assert formats.error_statistics(form, x).largest == 0
    if name.endswith(("/row", "/32", "/16", "_16")):
        x[1] = np.linspace(-1, 1, 40)
        found = formats.fake_quantise(form, x)
        assert (found[[0, 2]] == 0).all()
        assert found[1].any()
    encoded = form.encode(x)
    again = form.unpack(form.pack(encoded), x.shape)
    assert np.array_equal(form.decode(again), form.decode(encoded))


def test_an_error_on_zeros_is_not_perfect():
    class Wrong:
        name = "wrong"

        def encode(self, x):
            return x

        def decode(self, x):
            return x + 1

    found = formats.error_statistics(Wrong(), np.zeros((2, 4), np.float32))
    assert (found.relative_mse, found.sqnr_db, found.largest) == (np.inf, -np.inf, 1.0)


@pytest.mark.parametrize("name", ["int8/row", "fp8_e4m3/row", "mxfp8_e4m3", "shift5/row", "bipolar4/row"])
@pytest.mark.parametrize("size", [1e-18, 1e-19, 1e18])
def test_products_of_small_and_large_scales_keep_their_digits(name, size):
    form = formats.parse(name)
    rng = np.random.default_rng(0)
    a, b = (form.encode((rng.normal(size=(4, 64)) * size).astype(np.float32)) for _ in range(2))
    exact = form.decode(a).astype(np.float64) @ form.decode(b).astype(np.float64).T
    assert np.abs(formats.matmul(form, a, form, b) - exact).max() < 1e-6 * np.abs(exact).max() + 1e-45


def test_scales_whose_product_overflows_meet_zero():
    form = formats.parse("int8/row")
    a, b = (form.encode(np.array([row], np.float32)) for row in ([1e30, 0], [0, 1e30]))
    assert formats.matmul(form, a, form, b).tolist() == [[0.0]]


@pytest.mark.parametrize("name", ["uint4/row", "int4/32,fp16"])
def test_rounding_out_of_the_range_of_the_type_is_refused(name):
    form = formats.parse(name)
    with pytest.raises(InputError, match="beyond the range of"):
        formats.fake_quantise(form, np.array([[65504, -65504, 1, 2]], np.float16))
    with pytest.raises(InputError, match="beyond the range of"):
        formats.fake_quantise(form, torch.tensor([[65504, -65504, 1, 2]], dtype=torch.float16))
    if name == "uint4/row":
        with pytest.raises(InputError, match="beyond the range of"):
            formats.fake_quantise(form, np.array([[3.4e38, -3.4e38]], np.float32))


@pytest.mark.parametrize(
    "name",
    ["int4/0", "uint4/0", "ovp4/0", "mxfp4_0", "bfp12_0", "int4/99999999999999999999999", "int" + "9" * 5000, "int٤",
     "bfp12_99999999999", "shift3/0"],
)  # fmt: skip
def test_names_of_impossible_formats(name):
    with pytest.raises(InputError):
        formats.parse(name)


@pytest.mark.parametrize("make", [
    lambda: Scaled(formats.parse("int4/row").element, 0), lambda: Scaled(formats.parse("int4/row").element, "block"),
    lambda: Scaled(formats.parse("int4/row").element, True), lambda: AsymmetricInteger(4, -3),
    lambda: OutlierVictimPairs(4, "foo"), lambda: OutlierVictimPairs(4, 0),
])  # fmt: skip
def test_groups_of_formats_made_by_hand(make):
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("name", ["int4/32", "uint4/32", "ovp4/row", "fp8_e4m3/row", "bipolar4/row"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_damaged_scales_are_found(name, bad):
    form = formats.parse(name)
    packed = form.pack(form.encode(np.ones((1, 32), np.float32)))
    at = 16 if name != "fp8_e4m3/row" else 32
    packed[at : at + 4] = np.array([bad], np.float32).view(np.uint8)
    with pytest.raises(InputError, match="scales hold NaN"):
        form.unpack(packed, (1, 32))


@pytest.mark.parametrize("name", ["int4/32", "uint4/32", "ovp4/32", "mxfp4"])
def test_bytes_and_shapes_that_hold_nothing(name):
    form = formats.parse(name)
    for packed, shape in ((b"abcd", (1, 32)), (np.zeros(4, np.int8), (1, 32)), (np.zeros((2, 2), np.uint8), (1, 32)),
                          (np.zeros(4, np.uint8), ()), (np.zeros(0, np.uint8), (0, 32))):  # fmt: skip
        with pytest.raises(InputError):
            form.unpack(packed, shape)


def test_groups_that_do_not_divide_one_another():
    a, b = formats.parse("int4/4"), formats.parse("int4/6")
    x = np.ones((2, 12), np.float32)
    with pytest.raises(InputError, match="divide one another"):
        formats.matmul(a, a.encode(x), b, b.encode(x))


@pytest.mark.parametrize(("left", "right"), [("fp8_e5m2/row", "fp8_e5m2/row"), ("shift6/row", "shift6/32")])
def test_sums_beyond_64_bits(left, right):
    forms = [formats.parse(left), formats.parse(right)]
    rng = np.random.default_rng(0)
    x = [np.exp(rng.uniform(-20, 10, (3, 64))) * rng.choice([-1, 1], (3, 64)) for _ in forms]
    a, b = (form.encode(each.astype(np.float32)) for form, each in zip(forms, x, strict=True))
    exact = forms[0].decode(a).astype(np.float64) @ forms[1].decode(b).astype(np.float64).T
    found = formats.matmul(forms[0], a, forms[1], b)
    assert np.abs(found - exact).max() <= 2e-7 * np.abs(exact).max()
    integers = [form.integers(each.codes).astype(object) for form, each in zip(forms, (a, b), strict=True)]
    whole = integers[0] @ integers[1].T
    if right == left:
        assert max(abs(int(each)) for each in whole.flat) > 1 << 63
        scale = a.scale.astype(np.float64) * b.scale.astype(np.float64).T
        assert np.allclose(found, whole.astype(np.float64) * scale, rtol=1e-7)


def test_codes_beyond_halves_are_refused():
    form = formats.parse("int8/row")
    encoded = form.encode(np.ones((1, 1 << 16), np.float32))

    class Huge:
        def integers(self, codes):
            return codes.astype(np.int64) << 32

    with pytest.raises(InputError, match="64 bits"):
        formats.matmul(Huge(), encoded, Huge(), encoded)


def test_exact_products_beyond_53_bits():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(1 << 30), 1 << 30, (3, 5)) | 1 for _ in range(2))
    exact = [[sum(int(x) * int(y) for x, y in zip(row, column, strict=True)) for column in b] for row in a]
    assert base.exact_product(a, b).tolist() == exact


def test_scales_beyond_half_precision():
    with pytest.raises(InputError, match="float16"):
        formats.parse("uint4/row,fp16").encode(np.array([[-1e6, 1e6]], np.float32))


def test_the_smallest_scale_is_a_normal_number():
    encoded = formats.parse("int8/row").encode(np.full((1, 4), 1e-44, np.float32))
    assert encoded.scale[0, 0] >= np.finfo(np.float32).tiny
    half = formats.parse("int8/row,fp16").encode(np.full((1, 4), 1e-9, np.float32))
    assert half.scale[0, 0] >= np.finfo(np.float16).tiny


def test_biases_of_outliers():
    assert OutlierVictimPairs(4, "row").bias == 2
    assert OutlierVictimPairs(8, "row", bias=9).bias == 9
    for bits, bias in ((4, 0), (4, 1), (4, 12), (8, 1), (8, 10), (8, 11)):
        with pytest.raises(InputError, match="bias"):
            OutlierVictimPairs(bits, "row", bias=bias)


def test_codes_are_kept_in_shape():
    encoded = formats.parse("int4/32").encode(np.ones((2, 40), np.float32))
    assert isinstance(encoded, Encoded)
    assert encoded.codes.shape == (2, 64)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packed_bits_lie_one_after_the_other(bits, count):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, count)
    packed = base.pack_codes(codes, bits)
    number = sum(int(code) << (place * bits) for place, code in enumerate(codes))
    assert packed.tobytes() == number.to_bytes(-(-count * bits // 8), "little")
    assert np.array_equal(base.unpack_codes(packed, bits, count), codes)
