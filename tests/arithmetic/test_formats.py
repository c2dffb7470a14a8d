"""Number formats against ml_dtypes, closed-form references and each other."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bitwright.arithmetic import formats
from bitwright.arithmetic.formats.elements import FLOATS
from bitwright.arithmetic.quantise import quantise_asymmetric, quantise_symmetric
from bitwright.core.errors import InputError

PEERS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2, "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn, "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip
NAMES = (
    "int2/row", "int3/16", "int4/32", "int4/32,fp16", "int8/row", "int8/tensor", "uint4/32", "uint3/row",
    "uint8/tensor", "bipolar1/row", "bipolar2/16", "bipolar4/row", "bipolar8/tensor", "ovp4/row", "ovp8/tensor",
    "shift5/row", "shift4/none", "lmul_e4m3/row", "lmul_e5m2/tensor",
    "fp8_e4m3/none", "fp8_e4m3/row", "fp8_e5m2/tensor", "fp6_e2m3/32", "fp6_e3m2/row", "fp4_e2m1/16",
    "mxfp8_e4m3",
    "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp4_16", "mxint8", "bfp12_32", "bfp14_64", "bfp16_64",
)  # fmt: skip


def finite_bits(count, width, seed=0):
    """Random bit patterns of float16 or bfloat16 that are finite numbers, as float32."""
    patterns = np.random.default_rng(seed).integers(0, 1 << 16, count).astype(np.uint16)
    real = patterns.view(np.float16 if width == "half" else ml_dtypes.bfloat16).astype(np.float32)
    return real[np.isfinite(real)]


@pytest.mark.parametrize("name", PEERS)
def test_every_half_precision_number_rounds_as_ml_dtypes(name):
    form, element = formats.parse(f"{name}/none"), FLOATS[name]
    for width in ("half", "bfloat"):
        patterns = np.arange(1 << 16, dtype=np.uint16)
        x = patterns.view(np.float16 if width == "half" else ml_dtypes.bfloat16).astype(np.float32)
        x = x[np.isfinite(x)]
        within = np.clip(x, -element.largest, element.largest)  # ml_dtypes overflows to NaN or infinity, we saturate
        expected = within.astype(PEERS[name])
        encoded = form.encode(x)
        assert np.array_equal(form.decode(encoded), expected.astype(np.float32))
        assert np.array_equal(encoded.codes & ((1 << element.bits) - 1), expected.view(np.uint8))


@pytest.mark.parametrize("name", PEERS)
def test_every_code_means_what_ml_dtypes_says(name):
    element = FLOATS[name]
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    values = codes.view(PEERS[name]).astype(np.float64)
    known = np.isfinite(values)
    assert np.array_equal((element.integers[codes] * element.unit)[known], values[known])
    assert values[known].max() == element.largest


@pytest.mark.parametrize("name", ["int4/32", "int8/row", "int8/tensor", "int3/16"])
def test_integers_are_those_of_the_quantiser(name):
    x = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32)
    form = formats.parse(name)
    bits, kind = int(name[3]), name.split("/")[1]
    how = {"row": {"axis": 0}, "tensor": {}}.get(kind) or ({} if kind == "tensor" else {"group": int(kind)})
    expected = quantise_symmetric(x, bits, **how)
    encoded = form.encode(x)
    assert np.array_equal(encoded.codes.view(np.int8), expected.codes)
    assert np.array_equal(form.decode(encoded), expected.dequantise())


def test_zero_points_are_those_of_the_quantiser():
    x = np.random.default_rng(0).normal(1, 1, size=(5, 64)).astype(np.float32)
    form, expected = formats.parse("uint4/16"), quantise_asymmetric(x, 4, group=16)
    encoded = form.encode(x)
    assert np.array_equal(encoded.codes, expected.codes)
    assert np.array_equal(form.decode(encoded), expected.dequantise())


def block_reference(x, mantissa_bits):
    """Block floating point by magic addition in float64: round to the step, clip to the largest integer."""
    top = np.abs(x).max()
    if top == 0:
        return np.zeros_like(x)
    step = 2.0 ** (np.floor(np.log2(np.float64(top))) - mantissa_bits + 2)
    magic = 1.5 * 2.0**52 * step
    return np.clip((x + magic) - magic, -(2 ** (mantissa_bits - 1) - 1) * step, (2 ** (mantissa_bits - 1) - 1) * step)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("mantissa_bits", [4, 6, 8])
def test_block_floating_point(mantissa_bits, block):
    rng = np.random.default_rng(mantissa_bits)
    x = np.concatenate([
        finite_bits(1 << 15, "half"), rng.normal(size=1 << 14), np.exp2(rng.integers(-30, 30, 1 << 12)),
        -np.exp2(rng.integers(-30, 30, 1 << 12)), rng.integers(-64, 64, 1 << 13) / 8, np.zeros(4 * block),
    ])  # fmt: skip
    x = x[: x.size // block * block].astype(np.float32)
    form = formats.parse(f"bfp{mantissa_bits + 8}_{block}")
    expected = np.concatenate(
        [block_reference(part, mantissa_bits) for part in x.astype(np.float64).reshape(-1, block)]
    )
    assert np.array_equal(form.decode(form.encode(x)), expected.astype(np.float32))
    assert form.bits_per_element(x.shape) == mantissa_bits + 8 / block
    assert form.pack(form.encode(x)).size * 8 == x.size * (mantissa_bits + 8 / block)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"])
def test_microscaling_is_the_element_over_the_shared_power_of_two(name):
    x = finite_bits(1 << 14, "bfloat")
    x = x[np.abs(x) < 2.0**100][: 1 << 13].reshape(-1, 32)
    element = {"mxfp4": "fp4_e2m1"}.get(name, name.replace("mx", ""))
    largest = FLOATS[element].largest
    form, expected = formats.parse(name), np.zeros_like(x)
    for row, out in zip(x, expected, strict=True):
        top = np.abs(row).max()
        if top:
            shared = 2.0 ** max(-127, np.floor(np.log2(np.float64(top))) - np.floor(np.log2(largest)))
            scaled = np.clip(row / shared, -largest, largest).astype(np.float32)
            out[:] = scaled.astype(PEERS[element]).astype(np.float64) * shared
    assert np.array_equal(form.decode(form.encode(x)), expected)


def test_mxint8_is_eight_bit_block_floating_point_with_the_exponent_of_the_largest():
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    form = formats.parse("mxint8")
    assert np.array_equal(form.decode(form.encode(x)), (peer := formats.parse("bfp16_32")).decode(peer.encode(x)))
    exponents = form.pack(form.encode(x))[-8:].astype(int) - 127
    assert np.array_equal(exponents, np.floor(np.log2(np.abs(x).reshape(-1, 32).max(1))))


@pytest.mark.parametrize("name", NAMES)
def test_names_packing_and_shapes(name):
    form = formats.parse(name)
    assert formats.parse(form.name) == form
    for shape in ((1,), (33,), (3, 100), (2, 3, 64)):
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        encoded = form.encode(x)
        packed = form.pack(encoded)
        back = form.unpack(packed, shape)
        assert np.array_equal(back.codes, encoded.codes)
        assert np.array_equal(back.scale, encoded.scale)
        decoded = form.decode(back)
        assert decoded.shape == shape
        assert -1e-6 < packed.size - form.bits_per_element(shape) * x.size / 8 < 2
        with pytest.raises(InputError, match="bytes"):
            form.unpack(packed[:-1], shape)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_rounded_stays(name):
    """Decoded values are in the format: rounding them again changes nothing (block exponents and scales return)."""
    form = formats.parse(name)
    x = np.random.default_rng(2).normal(size=(6, 64)).astype(np.float32)
    once = form.decode(form.encode(x))
    if name.startswith(("uint", "mxf")) or ("/" in name and "none" not in name):
        return  # their scales follow the rounded extremes
    assert np.array_equal(form.decode(form.encode(once)), once)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 70)),
                  elements=st.floats(-1e4, 1e4, width=32, allow_nan=False)),
)  # fmt: skip
def test_rounding_goes_to_a_nearest_value(name, x):
    """No code of the format is nearer: brute force over all codes of each value's own scale."""
    form = formats.parse(name)
    encoded = form.encode(x)
    decoded = form.decode(encoded).astype(np.float64)
    codes = np.arange(256, dtype=np.uint8)
    scale = np.broadcast_to(encoded.scale[..., None] if encoded.scale.ndim else encoded.scale,
                            (*encoded.codes.shape[:-1], *encoded.scale.shape[-1:], 1))  # fmt: skip
    if hasattr(form, "element") and not name.startswith("shift"):  # those round logarithms
        values = np.unique(form.element.integers[codes])
        values = values[np.abs(values) * form.element.unit <= form.element.largest].astype(np.float64)
        per = encoded.codes.shape[-1] // scale.shape[-2] if encoded.scale.ndim else encoded.codes.shape[-1]
        each = np.repeat(scale[..., 0], per, axis=-1)[..., : x.shape[-1]]
        nearest = np.abs(values[None, None] * each[..., None].astype(np.float64) - x[..., None]).min(-1)
        slack = 1e-6 * (np.abs(x) + each) + 1e-45
        assert (np.abs(decoded - x) <= nearest + slack).all()


@pytest.mark.parametrize(
    ("left", "right"),
    [("int8/row", "int4/32"), ("bfp12_32", "bfp16_64"), ("fp8_e4m3/row", "mxfp4"), ("uint4/16", "int8/tensor"),
     ("fp8_e4m3/none", "fp8_e5m2/none")],
)  # fmt: skip
def test_products_of_codes_are_those_of_decoded_values(left, right):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(5, 100)).astype(np.float32), rng.normal(size=(7, 100)).astype(np.float32)
    one, two = formats.parse(left), formats.parse(right)
    a_codes, b_codes = one.encode(a), two.encode(b)
    expected = one.decode(a_codes).astype(np.float64) @ two.decode(b_codes).astype(np.float64).T
    found = formats.matmul(one, a_codes, two, b_codes)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_torch_tensors_come_back_as_they_went():
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    made = formats.fake_quantise(formats.parse("mxfp8_e4m3"), x)
    assert (made.dtype, made.shape) == (x.dtype, x.shape)
    assert np.array_equal(made.float().numpy(), formats.fake_quantise(formats.parse("mxfp8_e4m3"), x.float().numpy()))


@pytest.mark.parametrize("name", NAMES)
def test_values_without_a_code_are_refused_by_name(name):
    form = formats.parse(name)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputError, match=r"has no code for NaN or infinity.*holds 1"):
            form.encode(np.array([[1.0, bad]], np.float32))
    with pytest.raises(InputError, match="floating-point"):
        form.encode(np.ones((2, 2), np.int32))
    with pytest.raises(InputError, match="floating-point"):
        form.encode(np.ones((0, 2), np.float32))


@pytest.mark.parametrize(
    "name", ["int9/row", "int1/row", "int4/0", "fp7", "bfp8_32", "bfp12_0", "mxfp4_0", "uint4/none", ""]
)
def test_bad_names(name):
    with pytest.raises(InputError):
        formats.parse(name).encode(np.ones((1, 4), np.float32))
    with pytest.raises(InputError, match="Formats are written: int4/32"):
        formats.parse("fp7")


def test_codes_that_are_never_made_are_refused():
    form = formats.parse("fp8_e4m3/none")
    with pytest.raises(InputError, match="beyond 448"):
        form.unpack(np.array([0x7F], np.uint8), (1,))
    with pytest.raises(InputError, match="NaN"):
        formats.parse("mxfp4").unpack(np.array([0] * 16 + [255], np.uint8), (32,))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bipolar_integers(bits):
    """All odd integers, and signed v as 2 v + 1 by flipping the top bit of its two's complement pattern."""
    form = formats.parse(f"bipolar{bits}/row")
    codes = np.arange(1 << bits, dtype=np.uint8)
    plus_or_minus = 2 * ((codes[:, None] >> np.arange(bits)) & 1).astype(int) - 1
    assert np.array_equal(form.integers(codes), (plus_or_minus << np.arange(bits)).sum(axis=1))
    v = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    flipped = (v & ((1 << bits) - 1)) ^ (1 << (bits - 1))
    assert np.array_equal(form.integers(flipped), 2 * v + 1)


def test_bipolar_scales_are_searched():
    x = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    for bits, gauss in ((1, 0.3634), (2, 0.1188)):  # optimal uniform quantisers of normal data (Max, 1960)
        found = formats.error_statistics(formats.parse(f"bipolar{bits}/row"), x).relative_mse
        assert found == pytest.approx(gauss, rel=0.06)


def test_powers_of_two():
    form = formats.parse("shift5/none")
    x = np.array([0, 1, -1, 0.75, 0.7, -0.36, 0.35, 2.0**-14, 2.0**-20, 7], np.float32)
    # the logarithm is rounded: 0.75 lies above 2^-0.5, 0.7 below; what is too small or large takes the nearest power
    expected = [0, 1, -1, 1, 0.5, -0.5, 0.25, 2.0**-14, 2.0**-14, 1]
    assert form.decode(form.encode(x)).tolist() == expected
    assert len(np.unique(form.integers(np.arange(32, dtype=np.uint8)))) == 31


def test_error_statistics():
    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    found = formats.error_statistics(formats.parse("int8/row"), x)
    assert found.sqnr_db == pytest.approx(-10 * np.log10(found.relative_mse))
    assert formats.error_statistics(formats.parse("int4/32"), x).sqnr_db < found.sqnr_db - 15
