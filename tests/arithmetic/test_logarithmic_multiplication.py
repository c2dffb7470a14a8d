"""L-Mul against the rule in big integers, all pairs of FP8 codes, and the published and analytic errors."""

import ml_dtypes
import numpy as np
import pytest

from bitwright.arithmetic import logarithmic_errors as errors
from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.arithmetic.operation_energy import product_energy
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.format_products import product_unit

PEERS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
OFFSETS = {"e4m3": 7 * 8 - 1, "e5m2": 15 * 4 - 1, "bf16": 127 * 128 - 8, "fp16": 15 * 1024 - 64,
           "fp32": 127 * 2**23 - 2**19}  # fmt: skip
SIZES = {"e4m3": (4, 3), "e5m2": (5, 2), "bf16": (8, 7), "fp16": (5, 10), "fp32": (8, 23)}


def rule(x, y, fmt):
    """The adder rule on two codes, in Python's integers: a code, None for NaN."""
    exponent_bits, m = SIZES[fmt]
    width = exponent_bits + m
    mask, lowest = (1 << width) - 1, 1 << m
    top = mask if fmt == "e4m3" else ((1 << exponent_bits) - 1) << m
    sign = ((x ^ y) >> width & 1) << width
    a, b = x & mask, y & mask
    if a > top or b > top or (fmt == "e4m3" and top in (a, b)):
        return None
    if top in (a, b):
        return None if min(a, b) < lowest else sign | top
    total = a + b - OFFSETS[fmt]
    if a < lowest or b < lowest or total < lowest:
        return sign
    if total >= top:
        return sign | (top - 1 if fmt in PEERS else top)
    return sign | total


def agrees(found, x_codes, y_codes, fmt, kind, store):
    """All products equal the rule's: value, sign of zeros, NaN."""
    codes = [rule(a, b, fmt) for a, b in zip(x_codes.tolist(), y_codes.tolist(), strict=True)]
    nan = np.array([code is None for code in codes])
    expected = np.array([code or 0 for code in codes], store).view(kind).astype(np.float64)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan], expected[~nan])
    assert np.array_equal(np.signbit(found[~nan]), np.signbit(expected[~nan]))


@pytest.mark.parametrize("fmt", PEERS)
def test_every_pair_of_fp8_codes(fmt):
    every = np.arange(256, dtype=np.uint8)
    x, y = (grid.reshape(-1) for grid in np.meshgrid(every, every, indexing="ij"))
    numbers = every.view(PEERS[fmt]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        found = lmul.multiply(numbers[x], numbers[y], fmt, nan="propagate")
    agrees(found, x, y, fmt, PEERS[fmt], np.uint8)
    assert np.array_equal(lmul.values(every, fmt), numbers.astype(np.float64), equal_nan=True)
    with np.errstate(invalid="ignore"):
        again = lmul.codes(numbers, fmt, "propagate")
    assert np.array_equal(lmul.values(again, fmt), numbers.astype(np.float64), equal_nan=True)


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "fp32"])
def test_wider_formats_on_random_codes_and_special_values(fmt):
    rng = np.random.default_rng(0)
    size = 32 if fmt == "fp32" else 16
    kind = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[fmt]
    store = np.uint32 if size == 32 else np.uint16
    exponent_bits, m = SIZES[fmt]
    top = ((1 << exponent_bits) - 1) << m
    least = OFFSETS[fmt] + 2 * (1 << m) - top // 2
    magnitudes = [0, 1, (1 << m) - 1, 1 << m, (1 << m) + 1, top // 2, top - 1, top, top + 1, top | (1 << m - 1), least,
                  OFFSETS[fmt] // 2, OFFSETS[fmt] // 2 + (1 << m) // 2, OFFSETS[fmt]]  # fmt: skip
    special = np.array([each | sign << size - 1 for each in magnitudes for sign in (0, 1)])
    crossed = [grid.reshape(-1) for grid in np.meshgrid(special, special, indexing="ij")]
    x, y = (np.concatenate([rng.integers(0, 1 << size, 1_000_000), part]).astype(store) for part in crossed)
    with np.errstate(all="ignore"):
        found = lmul.multiply(*(codes.view(kind).astype(np.float32) for codes in (x, y)), fmt)
    agrees(found, x, y, fmt, kind, store)


def test_the_unit_of_the_engine_computes_the_same():
    unit = product_unit("lmul_e4m3")
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F])
    x = lmul.values(codes, "e4m3")
    assert np.array_equal(unit.values(codes[:, None], codes[None]) * 2.0**unit.lsb, lmul.multiply(x[:, None], x[None]))


def test_both_forms():
    """Equal while 1 + t stays in the binade, then apart by 2 t / (1 + t)."""
    rng = np.random.default_rng(0)
    x, y = (lmul.round_mantissa(rng.uniform(1, 1.99, 50000), 7).astype(np.float64) for _ in range(2))
    adder, formula = (lmul.multiply(x, y, "bf16", form) for form in ("adder", "algebraic"))
    t = (x - 1.0) + (y - 1.0) + lmul.correction(7)
    assert np.array_equal(adder[t <= 1], formula[t <= 1])
    expected = np.where(t < 2, 2 * t, 4 * (t - 1)) / (1 + t)
    assert np.allclose((adder / formula)[t > 1], expected[t > 1], rtol=1e-12)
    assert (t > 1).any()
    assert (t >= 2).any()
    assert (adder / formula).max() > 1.25


# Mean absolute error (bias): exact product rounded, adder, adder without constant, algebraic.
TABLE = {
    2: (0.070, 0.146, 0.069, 0.118), 3: (0.035, 0.058, 0.048, 0.073), 4: (0.018, 0.053, 0.041, 0.070),
    7: (0.0023, 0.027, 0.039, 0.075), 10: (0.0003, 0.027, 0.039, 0.076),
}  # fmt: skip


@pytest.mark.parametrize("mantissa", TABLE)
def test_error_table(mantissa):
    forms = (("product", "paper"), ("adder", "paper"), ("adder", "none"), ("algebraic", "paper"))
    for (form, offset), published in zip(forms, TABLE[mantissa], strict=True):
        found = errors.error(mantissa, form=form, offset=offset, pairs=300_000).mean_absolute
        assert found == pytest.approx(published, rel=0.03, abs=0.0006)


@pytest.mark.parametrize("form", ["adder", "algebraic"])
@pytest.mark.parametrize("mantissa", [2, 3, 4, 7, None])
def test_errors_are_the_analytic_ones(mantissa, form):
    expected = errors.expected_error(mantissa, form)
    found = errors.error(mantissa or 23, form=form, pairs=400_000)
    assert found.mean_absolute == pytest.approx(expected.mean_absolute, rel=0.01)
    assert found.bias == pytest.approx(expected.bias, abs=5e-4)
    assert found.largest == pytest.approx(expected.largest, rel=0.03)


def test_dot_products():
    """Relative error of dot products of 1,024 normal numbers; dividing the gain out leaves less."""
    for mantissa, published, exact in ((2, 0.165, 0.081), (3, 0.064, 0.042), (4, 0.059, 0.020)):
        found = errors.dot_product_error(mantissa)
        assert found.relative_rms == pytest.approx(published, rel=0.15)
        assert found.gain > 1.04
        assert found.rms_without_gain < 0.75 * found.relative_rms
        assert errors.dot_product_error(mantissa, form="product").relative_rms == pytest.approx(exact, rel=0.17)


def test_errors_of_tensors_and_formats():
    data = np.random.default_rng(0).normal(size=5000)
    wide, narrow = errors.error(3, data, pairs=100_000), errors.error("e4m3", data, pairs=100_000)
    assert narrow.largest == pytest.approx(1, abs=0.01)  # flushed to zero
    assert narrow.mean_absolute > wide.mean_absolute
    rounded = errors.error("e4m3", "uniform", "product", pairs=100_000)
    assert rounded.mean_absolute == pytest.approx(
        errors.error(3, form="product", pairs=100_000).mean_absolute, rel=1e-9
    )


@pytest.mark.parametrize("mantissa", lmul.MANTISSAS)
def test_products_sum_in_order(mantissa):
    """Scales that overflow, underflow and vanish included; threads do not change the sums."""
    rng = np.random.default_rng(mantissa)
    a = (rng.normal(size=(5, 37)) * np.exp2(rng.integers(-70, 60, (5, 37)))).astype(np.float32)
    b = (rng.normal(size=(37, 300)) * np.exp2(rng.integers(-70, 60, (37, 300)))).astype(np.float32)
    a[0, :5], b[3] = 0, 0
    left, right = lmul.round_mantissa(a, mantissa), lmul.round_mantissa(b, mantissa)
    expected = np.zeros((5, 300), np.float32)
    for k in range(37):
        each = lmul.multiply(left[:, k, None], right[None, k], "fp32", offset=lmul.correction(mantissa))
        expected += each.astype(np.float32)
    assert np.array_equal(lmul.matmul(a, b, mantissa), expected)
    assert np.array_equal(lmul.matmul(a, b, mantissa, threads=3), expected)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("every", [1, 5, 32])
def test_sums_of_few_bits(name, every):
    """Against rounding by ml_dtypes after every few products; sums that vanish and that are too large included."""
    kind = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp8_e4m3": ml_dtypes.float8_e4m3fn,
            "fp8_e5m2": ml_dtypes.float8_e5m2}[name]  # fmt: skip
    top = float(ml_dtypes.finfo(kind).max)
    rng = np.random.default_rng(every)
    a = (rng.normal(size=(6, 71)) * np.exp2([[-12], [-8], [-4], [0], [4], [9]])).astype(np.float32)
    b = (rng.normal(size=(71, 270)) * np.exp2(rng.integers(-8, 6, 270))).astype(np.float32)
    left, right = lmul.round_mantissa(a, 3), lmul.round_mantissa(b, 3)
    expected = np.zeros((6, 270), np.float32)
    for start in range(0, 71, every):
        part = np.zeros((6, 270), np.float32)
        for k in range(start, min(start + every, 71)):
            part += lmul.multiply(left[:, k, None], right[None, k], "fp32", offset=0.125).astype(np.float32)
        expected = np.clip(expected + part, -top, top).astype(kind).astype(np.float32)
    assert np.array_equal(lmul.matmul(a, b, 3, accumulation=f"{name}/{every}"), expected)
    if every == 32:
        assert np.array_equal(lmul.matmul(a, b, 3, accumulation=name, threads=2), expected)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "fp16"])
def test_products_in_the_range_of_a_format(fmt):
    rng = np.random.default_rng(5)
    layout = lmul.FORMATS[fmt]
    m = layout.mantissa_bits
    size = layout.largest**0.5
    a, b = (lmul.values(lmul.codes(rng.normal(0, size, shape) * 10.0 ** rng.integers(-6, 1, shape), fmt), fmt)
            .astype(np.float32) for shape in ((9, 70), (70, 300)))  # fmt: skip
    a, b = np.clip(a, -layout.largest, layout.largest), np.clip(b, -layout.largest, layout.largest)
    products = lmul.multiply(a[:, :, None], b[None], fmt)
    assert (products == 0).any()
    assert (np.abs(products) >= layout.largest).any()
    if layout.saturates:
        made = lmul.matmul(a, b, m, exponents=fmt, threads=2)
        assert np.allclose(made, products.sum(1), rtol=1e-5, atol=1e-5 * np.abs(products).max())
    with pytest.raises(InputError, match=f"range of {fmt}.*adder form"):
        lmul.matmul(a, b, m, "algebraic", exponents=fmt)


def test_overflow_gives_infinity():
    big = np.full((1, 1), 3e38, np.float32)
    assert lmul.matmul(big, big)[0, 0] == np.inf
    assert lmul.matmul(big, -big)[0, 0] == -np.inf
    assert lmul.matmul(big, 4 / big)[0, 0] == pytest.approx(4, rel=0.2)


def test_the_algebraic_product_is_three_products():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(7, 64)).astype(np.float32), rng.normal(size=(64, 9)).astype(np.float32)
    left, right = lmul.round_mantissa(a, 4), lmul.round_mantissa(b, 4)
    expected = lmul.multiply(left[:, :, None], right[None], "fp32", "algebraic", lmul.correction(4)).sum(axis=1)
    assert np.abs(lmul.matmul(a, b, 4, "algebraic") - expected).max() < 1e-5


def test_energies():
    fp32 = product_energy()
    assert fp32.element_wise_saving == pytest.approx(0.973, abs=5e-4)
    assert fp32.dot_product_saving == pytest.approx(0.783, abs=5e-4)
    decode, prefill = (product_energy(memory_j_per_bit=20e-12, reuse=reuse).layer_saving for reuse in (1, 512))
    assert decode < 0.01 < prefill < fp32.dot_product_saving
    assert product_energy(memory_j_per_bit=20e-12).layer_saving == pytest.approx(3.6e-12 / (4.6e-12 + 640e-12))
    assert product_energy(bits=8).dot_product_saving < 0.2


def test_offsets():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20000)).astype(np.float32)

    def squared(offset):
        found = lmul.multiply(x, y, "fp16", offset=offset)
        left, right = x.astype(np.float16).astype(float), y.astype(np.float16).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nanmean(np.square(np.where(found, found / (left * right) - 1, np.nan)))

    assert squared("auto") <= min(squared(offset) for offset in ("paper", "none", *range(0, 256, 8)))
    assert 0.03 < errors.best_constant(rng.normal(size=1000), 23) < 0.1
    assert errors.best_constant("uniform", 23, "algebraic") == pytest.approx((2 * np.log(2) - 1) ** 2, rel=0.01)
    assert np.array_equal(lmul.multiply(x, y, "fp16", offset=64), lmul.multiply(x, y, "fp16"))
    assert np.array_equal(lmul.multiply(x, y, "bf16", offset=0.0), lmul.multiply(x, y, "bf16", offset="none"))


@pytest.mark.parametrize("form", ["adder", "algebraic"])
def test_offsets_from_data_for_a_matrix_product(form):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 96)).astype(np.float32), rng.normal(size=(96, 30)).astype(np.float32)
    exact = a.astype(np.float64) @ b
    found = {
        offset: np.square(lmul.matmul(a, b, 4, form, offset) - exact).mean() for offset in ("paper", "none", "auto")
    }
    assert found["auto"] <= min(found["paper"], found["none"])
    assert lmul.best_matmul_offset(a, b, 4, form) * 16 in range(5)


def test_exact_products_of_rounded_operands():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 9)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    expected = a.astype(ml_dtypes.bfloat16).astype(np.float64) @ b.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.allclose(lmul.matmul(a, b, 7, "product"), expected, rtol=1e-5, atol=1e-6)
    peer = ml_dtypes.float8_e5m2
    x, y = (rng.normal(size=1000) * 100 for _ in range(2))
    left, right = (each.astype(np.float32).astype(peer).astype(np.float64) for each in (x, y))
    assert np.array_equal(lmul.multiply(x, y, "e5m2", "product"), np.clip(left * right, -57344, 57344))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: lmul.multiply([1.0], [1.0], "fp12"), UnknownNameError),
        (lambda: lmul.multiply([1.0], [1.0], form="exact"), UnknownNameError),
        (lambda: lmul.multiply([1], [1]), InputError),
        (lambda: lmul.multiply([np.nan], [1.0]), InputError),
        (lambda: lmul.multiply([np.inf], [1.0], "e5m2"), InputError),
        (lambda: lmul.multiply([1.0], [1.0], nan="zero"), UnknownNameError),
        (lambda: lmul.multiply([1.0], [1.0], offset=8), InputError),
        (lambda: lmul.multiply([1.0], [1.0], offset=1.0), InputError),
        (lambda: lmul.multiply([1.0], [1.0], offset=True), InputError),
        (lambda: lmul.multiply([1.0], [1.0], offset="mse"), InputError),
        (lambda: lmul.round_mantissa([1.0], 5), InputError),
        (lambda: lmul.round_mantissa([np.inf], 4), InputError),
        (lambda: lmul.matmul(np.ones((2, 3)), np.ones((2, 3))), InputError),
        (lambda: lmul.matmul(np.ones((2, 3), int), np.ones((3, 2))), InputError),
        (lambda: lmul.matmul(np.ones((2, 3)), np.ones((3, 2)), 4, "mitchell"), UnknownNameError),
        (lambda: lmul.matmul(np.ones((2, 3)), np.ones((3, 2)), accumulation="int8"), InputError),
        (lambda: lmul.matmul(np.ones((2, 3)), np.ones((3, 2)), accumulation="bf16/0"), InputError),
        (lambda: lmul.matmul(np.ones((2, 3)), np.ones((3, 2)), 4, "algebraic", accumulation="bf16"), InputError),
        (lambda: errors.error(3, "poisson"), InputError),
        (lambda: errors.error(3, np.zeros(4)), InputError),
        (lambda: errors.expected_error(10), InputError),
        (lambda: product_energy(bits=4), InputError),
        (lambda: product_energy("tsmc7"), UnknownNameError),
        (lambda: product_energy(accumulation="multiply fp32"), UnknownNameError),
        (lambda: product_energy(reuse=0), InputError),
        (lambda: product_energy(memory_j_per_bit=float("nan")), InputError),
    ],
)
def test_bad_input(call, error):
    with pytest.raises(error):
        call()


def test_float64_is_rounded_once():
    assert lmul.codes(np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40]), "bf16").tolist() == [
        0x3F81,
        0x3F80,
        0x3F80,
    ]
    assert lmul.codes(np.array([1 + 2**-4 + 2**-40]), "e4m3").tolist() == [0x39]
    assert lmul.codes(np.array([np.inf, 1e300, -1e-300]), "bf16").tolist() == [0x7F80, 0x7F80, 0x8000]
    assert lmul.round_mantissa(np.array([1 + 2**-5 + 2**-40]), 4)[0] == np.float32(1 + 2**-4)


def test_a_signalling_nan_of_bf16_stays_nan():
    signalling = np.array([0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(lmul.values(lmul.codes(signalling, "bf16"), "bf16")).all()


def test_numbers_beyond_float32_are_refused():
    with pytest.raises(InputError, match="beyond float32"):
        lmul.matmul(np.array([[1e300]]), np.array([[1e-10]]), 4)


@pytest.mark.parametrize("text", ["bf16/0", "bf16/²", "bf16/99999999999999", "bf16/", "fp32/4"])
def test_accumulators_that_there_are_not(text):
    with pytest.raises(InputError, match="Accumulation"):
        lmul.accumulator(text)


def test_errors_of_no_pairs_and_of_subnormal_data():
    assert np.isfinite(errors.error(4, data=np.array([1e-50, 1.0])).mean_absolute)
    for call in (
        lambda: errors.error(4, data=np.array([1e-50])), lambda: errors.error(4, pairs=0),
        lambda: errors.dot_product_error(4, count=0), lambda: errors.expected_error(4, form="foo"),
    ):  # fmt: skip
        with pytest.raises((InputError, UnknownNameError)):
            call()
