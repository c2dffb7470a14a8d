"""Units between registers: their gates against the models they stand for."""

import numpy as np
import pytest

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import InputError
from bitwright.engine import standalone_units as units
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library

LIBRARY = find_library("predictive-28nm")
L_MUL = {"e4m3": (4, 3, True, 0x7E), "e5m2": (5, 2, True, 0x7B), "bf16": (8, 7, False, 0x7F7F),
         "fp16": (5, 10, False, 0x7BFF)}  # fmt: skip


def outputs(unit, a, b, lanes=2048):
    """The result words (unsigned) of the mapped logic."""
    netlist = units.logic_gates(unit, LIBRARY).netlist(LIBRARY)
    rows = -(-a.size // lanes)
    drive = {"a": np.resize(a, (rows, lanes)), "b": np.resize(b, (rows, lanes))}
    found = simulate(netlist, drive).outputs["result"].reshape(-1)[: a.size]
    return found.astype(np.int64) & ((1 << unit.result_bits) - 1)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_fp8_l_mul_units_for_every_pair(fmt):
    highest = L_MUL[fmt][3]
    good = np.array([code for code in range(256) if code & 0x7F <= highest])
    a, b = (grid.reshape(-1) for grid in np.meshgrid(good, good, indexing="ij"))
    found = lmul.values(outputs(units.logarithmic_multiplier(*L_MUL[fmt]), a, b), fmt)
    assert np.array_equal(found, lmul.multiply(lmul.values(a, fmt), lmul.values(b, fmt), fmt))


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_wider_l_mul_units(fmt):
    rng = np.random.default_rng(0)
    top = L_MUL[fmt][3] + 1
    a, b = (rng.integers(0, top, 20000) | (rng.integers(0, 2, 20000) << 15) for _ in range(2))
    found = lmul.values(outputs(units.logarithmic_multiplier(*L_MUL[fmt]), a, b), fmt)
    with np.errstate(all="ignore"):
        x, y = (lmul.values(code, fmt).astype(np.float32) for code in (a, b))
        assert np.array_equal(found, lmul.multiply(x, y, fmt))


@pytest.mark.parametrize("fmt", ["e4m3", "bf16"])
def test_l_mul_without_range_checks_differs_out_of_range_only(fmt):
    exponent_bits, mantissa_bits, _, top = L_MUL[fmt]
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, top + 1, 20000) for _ in range(2))
    a[:500] = 0
    plain = outputs(units.logarithmic_multiplier(*L_MUL[fmt], checks_range=False), a, b)
    checked = outputs(units.logarithmic_multiplier(*L_MUL[fmt]), a, b)
    low = 1 << mantissa_bits
    one = 1 << (exponent_bits - 1)
    places = (a >> mantissa_bits) + (b >> mantissa_bits)
    inside = (places > one + 1) & (places < 3 * one - 3)  # sums well inside the exponents of the format
    zero = (a < low) | (b < low)
    assert np.array_equal(plain[inside | zero], checked[inside | zero])
    assert not plain[zero].any()
    assert (plain[~inside & ~zero] != checked[~inside & ~zero]).any()


def test_truncating_float_multiplier():
    """Every pair of E4M3 fractions, exponents around the bias: truncated to the product's three bits."""
    rng = np.random.default_rng(1)
    a, b = (rng.integers(5, 10, 20000) << 3 | rng.integers(0, 8, 20000) | (rng.integers(0, 2, 20000) << 7)
            for _ in range(2))  # fmt: skip
    found = lmul.values(outputs(units.float_multiplier(4, 3), a, b), "e4m3")
    exact = lmul.values(a, "e4m3") * lmul.values(b, "e4m3")
    ulp = np.exp2(np.floor(np.log2(np.abs(exact))) - 3)
    assert np.array_equal(found, np.sign(exact) * np.floor(np.abs(exact) / ulp) * ulp)


def test_half_by_uint4_is_exact_for_every_bit_pattern_and_integer():
    patterns = np.arange(1 << 16)
    unit = units.half_by_uint4()
    values = patterns.astype(np.uint16).view(np.float16).astype(np.float64)
    meaning = np.vectorize(units.half_by_uint4_value)
    for integer in range(16):
        words = outputs(unit, patterns, np.full(1 << 16, integer), 8192)
        with np.errstate(invalid="ignore"):
            expected = np.where(integer == 0, 0.0, values * integer)
        assert np.array_equal(meaning(words), expected, equal_nan=True)


def test_products_and_accumulators():
    product = units.product("int8*uint4")
    a, b = (grid.reshape(-1) for grid in np.meshgrid(np.arange(-128, 128), np.arange(16), indexing="ij"))
    found = outputs(product, a, b)
    assert np.array_equal((found ^ (1 << 11)) - (1 << 11), a * b)  # 12 bits hold -1920 .. 1905
    assert product.result_bits == 12
    single, mac = (units.unit_gates(unit, LIBRARY) for unit in (product, product.accumulating(32)))
    assert mac.sequential_area_um2 > single.sequential_area_um2
    with pytest.raises(InputError, match="do not hold"):
        product.accumulating(11)
    with pytest.raises(InputError, match="register"):
        units.logic_gates(product.accumulating(), LIBRARY)
