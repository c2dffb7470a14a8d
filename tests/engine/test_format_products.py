"""Products of number-format codes: tables against ml_dtypes, circuits against tables, engines in every dataflow."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from amaranth.hdl import Module, signed

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.baselines import gemm
from bitwright.engine.engine_gates import engine_gates, normal_products
from bitwright.engine.evaluate import run
from bitwright.engine.format_products import is_product, nearest_words, normal_words, product_name, product_unit
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library
from bitwright.engine.notation import parse_nest, print_nest
from bitwright.engine.rtl.arithmetic import Component, rtlil_text
from bitwright.engine.synthesis import synthesise
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.transformations import apply
from bitwright.engine.verify import verify, verify_netlist

FLOATS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp6_e2m3": ml_dtypes.float6_e2m3fn, "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip
UNITS = (
    *FLOATS,
    "int8*int4",
    "int8*uint4",
    "int8*shift3",
    "int8*mask",
    "int8*power5",
    "ovp4",
    "lmul_e4m3",
    "lmul_e5m2",
    "fp8_e4m3*fp4_e2m1",
    "fp8_e5m2*fp8_e4m3",
)
SHAPES = [("os", 3, 1), ("ws", 1, 3), ("cube", 2, 2), ("tree", 1, 4), ("matrix2d", 2, 1)]


class Unit(Component):
    """The product alone, its result extended to 64 bits."""

    name = "unit"

    def __init__(self, unit):
        super().__init__()
        self.unit = unit
        self.left = self.add_input("a", signed(unit.a_bits))
        self.right = self.add_input("b", signed(unit.b_bits))
        self.out = self.add_output("p", signed(unit.product_bits))

    def elaborate(self, platform=None):
        module = Module()
        module.d.comb += self.outputs["p"].eq(self.unit.circuit(module, self.inputs["a"], self.inputs["b"]))
        return module


@pytest.mark.parametrize("name", FLOATS)
def test_float_tables_are_products_of_ml_dtypes(name):
    unit = product_unit(name)
    codes = np.arange(1 << unit.a_bits, dtype=np.uint8)
    values = codes.view(FLOATS[name]).astype(np.float64)
    good = np.isfinite(values)
    expected = values[good, None] * values[None, good]
    found = unit.values(codes[good, None], codes[None, good]) * 2.0**unit.lsb
    assert np.array_equal(found, expected)


def test_mixed_fp8_products_are_those_of_ml_dtypes():
    unit = product_unit("fp8_e5m2*fp8_e4m3")
    codes = np.arange(256, dtype=np.uint8)
    left, right = (codes.view(kind).astype(np.float64) for kind in (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn))
    a, b = np.isfinite(left), np.isfinite(right)
    assert np.array_equal(unit.values(codes[a, None], codes[None, b]) * 2.0**unit.lsb, left[a, None] * right[None, b])
    assert (a == unit.a.numbers).all()
    assert (b == unit.b.numbers).all()


def lmul_reference(x, y, offset, mantissa_bits, top, kind):
    """The adder rule of L-Mul for one pair of FP8 codes, in plain integers."""
    lowest = 1 << mantissa_bits
    if (x & 0x7F) < lowest or (y & 0x7F) < lowest:
        return 0.0
    total = (x & 0x7F) + (y & 0x7F) - offset
    code = 0 if total < lowest else min(total, top)
    magnitude = float(np.uint8(code).view(kind))
    return -magnitude if (x ^ y) & 0x80 else magnitude


@pytest.mark.parametrize(
    ("name", "rule"),
    [("lmul_e4m3", (7 * 8 - 1, 3, 0x7E, ml_dtypes.float8_e4m3fn)),
     ("lmul_e5m2", (15 * 4 - 1, 2, 0x7B, ml_dtypes.float8_e5m2))],
)  # fmt: skip
def test_l_mul_adds_codes(name, rule):
    unit = product_unit(name)
    expected = [[lmul_reference(x, y, *rule) for y in range(256)] for x in range(256)]
    assert np.array_equal(unit.table * 2.0**unit.lsb, np.array(expected))


@pytest.mark.parametrize(
    ("name", "bad"), [("fp8_e4m3", 0x7F), ("fp8_e4m3", -1), ("lmul_e5m2", 0x7C), ("fp8_e5m2*fp4_e2m1", -4)]
)
def test_codes_of_nan_and_infinity_are_refused(name, bad):
    unit = product_unit(name)
    with pytest.raises(InputError, match=r"operand A has the code .* NaN or infinity"):
        unit.values([1, bad], [1, 1])
    nest = TensorEngine(2, 2, multiplier=name, accumulator_bits=60).nest
    with pytest.raises(InputError, match="NaN or infinity"):
        run(nest, [[1, bad]], [[1], [1]])


def test_normal_words_are_those_that_encoders_make():
    rng = np.random.default_rng(0)
    pairs = product_unit("ovp4").a
    decoded = {*range(-7, 8), *(sign * value for sign in (-1, 1) for value in (12, 16, 24, 32, 48, 64, 96))}
    everything = nearest_words(pairs, np.linspace(-120, 120, 5001)) & 127
    assert {int(value) for value in pairs.integers[everything]} == decoded
    assert ((everything >> 4 == 0) == (np.abs(pairs.integers[everything]) <= 7)).all()
    assert np.std(pairs.integers[normal_words(pairs, rng, (20000,)) & 127]) == pytest.approx(7 / 3, rel=0.03)
    chosen = normal_words(product_unit("int8*mask").b, rng, (20000,)) & 3
    assert set(chosen.tolist()) == {0, 1}
    assert chosen.mean() == pytest.approx(0.5, abs=0.02)
    assert (normal_words(product_unit("int8*uint4").b, rng, (20000,)) & 15).mean() == pytest.approx(7.5, abs=0.1)


def test_other_operands():
    shifted = product_unit("int8*shift3")
    assert shifted.values([5, -5], [0b01011, 0b11111]).tolist() == [40, 640]
    assert product_unit("int8*uint4").values([-7], [15]).tolist() == [-105]
    assert product_unit("int8*mask").values([-7, -7], [1, 0]).tolist() == [-7, 0]
    pairs = product_unit("ovp4").a.integers  # <e, i>: 3 << 5 is the largest outlier, 96
    assert (pairs[5 << 4 | 3], pairs[0 << 4 | 9], pairs[2 << 4 | 13]) == (96, -7, -12)


@pytest.mark.parametrize("name", UNITS)
def test_circuits_equal_tables_for_every_pair_of_words(name):
    unit = product_unit(name)
    library = find_library("predictive-28nm")
    netlist = synthesise(rtlil_text(Unit(unit)), "unit", library).netlist(library)
    a, b = (words.reshape(-1) for words in np.meshgrid(np.arange(1 << unit.a_bits), np.arange(1 << unit.b_bits),
                                                       indexing="ij"))  # fmt: skip
    lanes = 1024
    rows = -(-a.size // lanes)
    drive = {key: np.resize(words, (rows, lanes)) for key, words in (("a", a), ("b", b))}
    found = simulate(netlist, drive).outputs["p"].reshape(-1)[: a.size]
    mask = np.uint64((1 << unit.product_bits) - 1)
    assert np.array_equal(found & mask, unit.table[a, b].astype(np.uint64) & mask)


@pytest.mark.parametrize("name", UNITS)
def test_zero_words_give_zero(name):
    unit = product_unit(name)
    assert not unit.table[0].any()
    assert not unit.table[:, 0].any()


def test_evaluation_sums_products_of_codes():
    rng = np.random.default_rng(0)
    unit = product_unit("fp8_e4m3")
    x, y = rng.normal(0, 20, (5, 40)), rng.normal(0, 20, (40, 7))
    a, b = (nearest_words(unit.a, operand / 2.0**unit.a.lsb) for operand in (x, y))
    values = [operand.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) for operand in (x, y)]
    for dataflow, rows, depth in (("os", 2, 1), ("ws", 1, 4), ("cube", 2, 4), ("tree", 1, 4), ("matrix2d", 2, 1)):
        engine = TensorEngine(rows, 3, (), dataflow, depth, accumulator_bits=48, multiplier="fp8_e4m3")
        found = run(engine.nest, a, b) * 2.0**unit.lsb
        assert np.array_equal(found, values[0] @ values[1])


@pytest.mark.parametrize("name", UNITS)
def test_arrays_of_units_in_amaranth(name):
    bits = min(64, product_unit(name).product_bits + 9)
    engine = TensorEngine(2, 2, ("pipeline p",), accumulator_bits=bits, multiplier=name)
    assert verify(engine, vectors=60, simulator="amaranth").passed


@pytest.mark.eda
@pytest.mark.skipif(not shutil.which("iverilog"), reason="Icarus is not installed")
@pytest.mark.parametrize(("dataflow", "rows", "depth"), SHAPES)
def test_every_dataflow_in_icarus(dataflow, rows, depth):
    engine = TensorEngine(rows, 3, (), dataflow, depth, accumulator_bits=48, multiplier="fp8_e4m3")
    assert verify(engine, vectors=500, simulator="icarus").passed


@pytest.mark.eda
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("iverilog"), reason="Icarus is not installed")
@pytest.mark.parametrize(("dataflow", "rows", "depth"), SHAPES)
@pytest.mark.parametrize("name", UNITS)
def test_every_unit_in_every_dataflow(name, dataflow, rows, depth):
    bits = min(64, product_unit(name).product_bits + 11)
    engine = TensorEngine(rows, 3, (), dataflow, depth, accumulator_bits=bits, multiplier=name)
    assert verify(engine, vectors=300, simulator="icarus").passed


@pytest.mark.parametrize("name", ["ovp4", pytest.param("lmul_e5m2", marks=pytest.mark.slow)])
def test_netlists(name):
    engine = TensorEngine(2, 2, multiplier=name, accumulator_bits=40)
    assert verify_netlist(engine, find_library("predictive-28nm"), vectors=60).passed


@pytest.mark.slow
def test_energy_follows_the_width_of_the_product():
    library = find_library("predictive-28nm")
    cheap, dear = (engine_gates(TensorEngine(2, 2, multiplier=name, accumulator_bits=40), library)
                   for name in ("fp4_e2m1", "fp8_e4m3"))  # fmt: skip
    assert cheap.area_um2 < dear.area_um2
    assert cheap.energy_j_per_mac < dear.energy_j_per_mac


def test_sampled_words_avoid_the_codes_of_nan():
    for a, b in normal_products(TensorEngine(2, 2, multiplier="fp8_e4m3", accumulator_bits=48), streams=2):
        assert ((a & 0x7F) != 0x7F).all()
        assert ((b & 0x7F) != 0x7F).all()


def test_text_and_errors():
    for name in UNITS:
        nest = gemm("os", 2, 2, a_bits=8, b_bits=8, encoding=None, product=name, accumulator_bits=60)
        assert parse_nest(print_nest(nest)) == nest
    assert not is_product("int8*int8*int8")
    with pytest.raises(UnknownNameError, match="multiplier"):
        TensorEngine(multiplier="fp8_e6m1")
    with pytest.raises(InputError, match="need 65 bits"):
        TensorEngine(multiplier="fp8_e5m2")
    assert product_name("fp8_e5m2", "fp8_e5m2") is None
    assert product_name("fp8_e5m2", "fp8_e4m3") == "fp8_e5m2*fp8_e4m3"
    with pytest.raises(InputError, match="at least 37"):
        TensorEngine(multiplier="fp8_e4m3")
    with pytest.raises(InputError):
        apply(TensorEngine(2, 2, multiplier="fp4_e2m1").nest, "opt1")


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="iverilog is not installed")
@pytest.mark.eda
@pytest.mark.parametrize("name", ["uint4", "mask", "uint4*mask", "mask*uint4", "fp8_e4m3*uint4"])
def test_products_without_a_sign_in_hardware(name):
    unit = product_unit(name)
    verify(TensorEngine(2, 2, a_bits=unit.a_bits, b_bits=unit.b_bits, accumulator_bits=24, multiplier=name))


def test_every_pair_of_kinds_builds_a_nest_that_computes():
    names = [
        "int2", "int4", "int8", "uint4", "mask", "shift3", "power3", "power5", "ovp4", "fp8_e4m3", "fp6_e2m3",
        "fp4_e2m1",
    ]  # fmt: skip
    built = 0
    for a in names:
        for b in names:
            name = product_name(a, b)
            if name is None:
                continue
            unit = product_unit(name)
            bits = min(62, unit.product_bits + 8)
            engine = TensorEngine(2, 2, a_bits=unit.a_bits, b_bits=unit.b_bits, accumulator_bits=bits, multiplier=name)
            rng = np.random.default_rng(built)
            x, y = normal_words(unit.a, rng, (2, 3)), normal_words(unit.b, rng, (3, 2))
            assert np.array_equal(run(engine.nest, x, y), unit.matmul(x, y)), name
            built += 1
    assert built > 100


def test_accumulators_hold_what_encoders_make():
    assert product_unit("ovp4").sum_bits(1) == 15 < product_unit("ovp4").product_bits
    assert product_unit("int8").sum_bits(1) == product_unit("int8").product_bits


def test_sums_of_words_are_checked():
    unit = product_unit("int8")
    for a, b in ((np.ones((2, 3), int), np.ones((5, 2), int)), (np.ones(3, int), np.ones((3, 2), int))):
        with pytest.raises(InputError, match=r"\(m, k\) and \(k, n\)"):
            unit.matmul(a, b)
    with pytest.raises(InputError, match="8 bits, not 300"):
        unit.values(300, 1)
    wide = product_unit("fp8_e5m2*power6")
    with pytest.raises(InputError, match="leave int64"):
        wide.matmul(np.zeros((1, 64), int), np.zeros((64, 1), int))
