"""L-Mul against the rule in big integers, all pairs of FP8 codes, and the published and analytic errors."""

import ml_dtypes
import numpy as np
import pytest

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.format_products import product_unit

PEERS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
OFFSETS = {"e4m3": 7 * 8 - 1, "e5m2": 15 * 4 - 1, "bf16": 127 * 128 - 8, "fp16": 15 * 1024 - 64,
           "fp32": 127 * 2**23 - 2**19}  # fmt: skip
SIZES = {"e4m3": (4, 3), "e5m2": (5, 2), "bf16": (8, 7), "fp16": (5, 10), "fp32": (8, 23)}


def rule(x, y, fmt):
    """The adder rule on two codes, in Python's integers; None for NaN."""
    exponent_bits, m = SIZES[fmt]
    width = exponent_bits + m
    mask, lowest = (1 << width) - 1, 1 << m
    top = ((1 << exponent_bits) - 1) << m
    sign = ((x ^ y) >> width & 1) << width
    a, b = x & mask, y & mask
    if fmt not in PEERS:
        if a > top or b > top or (top in (a, b) and min(a, b) < lowest):
            return None
        if top in (a, b):
            return sign | top
    highest = {"e4m3": 0x7E, "e5m2": 0x7B}.get(fmt, top - 1)
    total = a + b - OFFSETS[fmt]
    if a < lowest or b < lowest or total < lowest:
        return sign
    if total > highest:
        return sign | (highest if fmt in PEERS else top)
    return sign | total


@pytest.mark.parametrize("fmt", PEERS)
def test_every_pair_of_fp8_codes(fmt):
    every = np.arange(256, dtype=np.uint8)
    numbers = every.view(PEERS[fmt]).astype(np.float32)
    good = every[np.isfinite(numbers)]
    x, y = (good.view(PEERS[fmt]).astype(np.float32)[grid] for grid in np.indices((len(good), len(good))))
    found = lmul.multiply(x, y, fmt)
    expected = np.array([[rule(int(a), int(b), fmt) for b in good] for a in good], np.uint8)
    assert np.array_equal(found, expected.view(PEERS[fmt]).astype(np.float64))


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "fp32"])
def test_wider_formats_on_random_codes_and_special_values(fmt):
    rng = np.random.default_rng(0)
    size = 32 if fmt == "fp32" else 16
    kind = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[fmt]
    store = np.uint32 if size == 32 else np.uint16
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 6e-8, 1.0, -1.5, 65504.0, 3e38], np.float64)
    with np.errstate(over="ignore"):
        special_codes = special.astype(np.float32).astype(kind).view(store)
    codes = np.concatenate([rng.integers(0, 1 << size, 20000).astype(store), special_codes, special_codes[::-1]])
    other = np.concatenate([rng.integers(0, 1 << size, 20000).astype(store), special_codes, special_codes])
    with np.errstate(all="ignore"):
        x, y = codes.view(kind).astype(np.float32), other.view(kind).astype(np.float32)
        found = lmul.multiply(x, y, fmt)
    for a, b, value in zip(codes.tolist(), other.tolist(), found.tolist(), strict=True):
        expected = rule(a, b, fmt)
        if expected is None:
            assert np.isnan(value)
        else:
            assert value == float(np.array([expected], store).view(kind)[0])


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
        found = lmul.error(mantissa, form=form, offset=offset, pairs=300_000).mean_absolute
        assert found == pytest.approx(published, rel=0.03, abs=0.0006)


def test_errors_approach_the_analytic_ones():
    adder, formula = (lmul.expected_error(10)[name] for name in ("adder", "algebraic"))
    for (mean, bias), form in ((adder, "adder"), (formula, "algebraic")):
        found = lmul.error(23, form=form, pairs=300_000)
        assert found.mean_absolute == pytest.approx(mean, rel=0.01)
        assert found.bias == pytest.approx(bias, rel=0.03)


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


def test_energy_and_offsets():
    assert lmul.energy_saving(False) == pytest.approx(0.973, abs=5e-4)
    assert lmul.energy_saving(True) == pytest.approx(0.783, abs=5e-4)
    assert lmul.energy_saving(True, memory_j_per_bit=20e-12) < 0.01
    assert 0.03 < lmul.best_offset(np.random.default_rng(0).normal(size=1000), 23) < 0.1


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: lmul.multiply([1.0], [1.0], "fp12"), UnknownNameError),
        (lambda: lmul.multiply([1.0], [1.0], form="exact"), UnknownNameError),
        (lambda: lmul.multiply([1], [1]), InputError),
        (lambda: lmul.multiply([np.nan], [1.0]), InputError),
        (lambda: lmul.multiply([1.0], [1.0], offset="auto"), InputError),
        (lambda: lmul.round_mantissa([1.0], 5), InputError),
        (lambda: lmul.round_mantissa([np.inf], 4), InputError),
        (lambda: lmul.matmul(np.ones((2, 3)), np.ones((2, 3))), InputError),
        (lambda: lmul.energy_saving(True, reuse=0), InputError),
    ],
)
def test_bad_input(call, error):
    with pytest.raises(error):
        call()
