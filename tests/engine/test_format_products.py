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
from bitwright.engine.format_products import is_product, nearest_words, product_unit
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
    "fp8_e4m3*fp4_e2m1",
)


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


def lmul_reference(x, y):
    """The adder rule of L-Mul for one pair of E4M3 codes, in plain integers."""
    if (x & 0x7F) < 8 or (y & 0x7F) < 8:
        return 0.0
    total = (x & 0x7F) + (y & 0x7F) - (7 * 8 - 1)
    code = 0 if total < 8 else min(total, 0x7E)
    magnitude = float(np.uint8(code).view(ml_dtypes.float8_e4m3fn))
    return -magnitude if (x ^ y) & 0x80 else magnitude


def test_l_mul_adds_codes():
    unit = product_unit("lmul_e4m3")
    expected = [[lmul_reference(x, y) for y in range(256)] for x in range(256)]
    assert np.array_equal(unit.table * 2.0**unit.lsb, np.array(expected))


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
    assert np.array_equal(found & mask, unit.values(a, b).astype(np.uint64) & mask)


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
@pytest.mark.parametrize(("dataflow", "rows", "depth"), [("os", 3, 1), ("ws", 1, 3), ("cube", 2, 2), ("tree", 1, 4),
                                                         ("matrix2d", 2, 1)])  # fmt: skip
def test_every_dataflow_in_icarus(dataflow, rows, depth):
    engine = TensorEngine(rows, 3, (), dataflow, depth, accumulator_bits=48, multiplier="fp8_e4m3")
    assert verify(engine, vectors=500, simulator="icarus").passed


def test_netlists_and_energy():
    engine = TensorEngine(2, 2, multiplier="ovp4", accumulator_bits=24)
    library = find_library("predictive-28nm")
    assert verify_netlist(engine, library, vectors=60).passed
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
        TensorEngine(multiplier="fp8_e5m2")
    with pytest.raises(InputError, match="at least 37"):
        TensorEngine(multiplier="fp8_e4m3")
    with pytest.raises(InputError):
        apply(TensorEngine(2, 2, multiplier="fp4_e2m1").nest, "opt1")
