"""The array with late dequantisation as RTL and as gates, against the model; its floating-point parts against numpy."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from amaranth.hdl import Module, Signal, unsigned

from bitwright.arithmetic.late_dequantisation import matmul, quantise_weights
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.late_dequantiser_waveforms import running_totals, verify, verify_gates, waveforms
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl.arithmetic import Component, Design, rtlil_text
from bitwright.engine.rtl.floating_units import multiply_floats, single_of_half, single_of_scaled
from bitwright.engine.rtl.late_dequantiser import Dequantiser, GroupSum, MixedArray, product_bits, sum_bits
from bitwright.engine.synthesis import synthesise
from bitwright.engine.testbench import simulate_amaranth

LIBRARY = find_library("predictive-28nm")
TOOLS = [pytest.param(name, marks=[pytest.mark.eda, pytest.mark.slow,
                                   pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")])
         for name, tool in (("icarus", "iverilog"), ("verilator", "verilator"))]  # fmt: skip


class Logic(Component):
    """A function of two words, without registers."""

    name = "unit"

    def __init__(self, function, a, b):
        super().__init__()
        self.function = function
        self.add_input("a", unsigned(a))
        self.add_input("b", unsigned(b))
        self.add_output("result", unsigned(32))

    def elaborate(self):
        module = Module()
        module.d.comb += self.outputs["result"].eq(self.function(module, self.inputs["a"], self.inputs["b"]))
        return module


def outputs(component, a, b, lanes=4096):
    netlist = synthesise(rtlil_text(component), "unit", LIBRARY).netlist(LIBRARY)
    rows = -(-a.size // lanes)
    drive = {name: np.resize(words, (rows, lanes)).astype(np.int64) for name, words in (("a", a), ("b", b))}
    return simulate(netlist, drive).outputs["result"].reshape(-1)[: a.size].astype(np.uint32)


def operands(activations, groups, group, size=(4, 4), seed=0):
    rng = np.random.default_rng(seed)
    k = groups * group - group // 2 + 1  # a short last group
    weights = quantise_weights(rng.normal(0, 0.1, (k, size[1])), group=group, half_scales=True)
    if activations == "a8":
        x = rng.integers(-128, 128, (size[0], k)).astype(np.int8)
        x[0, :group], x[-1, 1::3] = -128, 127
    else:
        x = (rng.normal(size=(size[0], k)) * np.exp2(rng.integers(-20, 9, (size[0], k)))).astype(np.float16)
        x[:, ::7], x[-1, ::5] = np.float16(6e-8), np.float16(-0.0)  # subnormal, zero with a sign
    return x, weights


def test_binary32_products_are_those_of_numpy():
    rng, count = np.random.default_rng(0), 60_000
    corners = np.array([0, 1, 0x7FFFFF, 0x800000, 0x800001, 0x1FFFFFFF, 0x20000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001,
                        0x5F7FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000])  # fmt: skip
    corners = np.concatenate([corners, corners | 1 << 31])
    pairs = [grid.reshape(-1) for grid in np.meshgrid(corners, corners)]
    x, y = (rng.integers(0, 1 << 32, count) for _ in range(2))
    balanced = (254 - (x >> 23 & 255) + rng.integers(-128, -98, count)).clip(0, 254) << 23 | (y & 0x807FFFFF)  # tiny
    a, b = np.concatenate([pairs[0], x, x]), np.concatenate([pairs[1], y, balanced])
    with np.errstate(all="ignore"):
        expected = a.astype(np.uint32).view(np.float32) * b.astype(np.uint32).view(np.float32)
    assert (np.abs(expected) < 1e-38).sum() > 5000  # subnormal results and those rounded to zero
    found = outputs(Logic(multiply_floats, 32, 32), a, b)
    nan = np.isnan(expected)
    assert np.isnan(found.view(np.float32)[nan]).all()
    assert np.array_equal(found[~nan], expected.view(np.uint32)[~nan])


def test_every_half_precision_number_times_every_code():
    """65,536 x 16 products as binary32 words: infinities and NaN pass unless the code is zero."""
    words, codes = (grid.reshape(-1) for grid in np.meshgrid(np.arange(1 << 16), np.arange(16), indexing="ij"))
    values = words.astype(np.uint16).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected = values * codes.astype(np.float32)
    found = outputs(Logic(single_of_half, 16, 4), words, codes, 65536).view(np.float32)
    special = ~np.isfinite(values)
    assert np.array_equal(found[~special].view(np.uint32), expected[~special].view(np.uint32))
    assert not found[special & (codes == 0)].any()
    rest = special & (codes > 0)
    assert np.array_equal(found[rest], expected[rest], equal_nan=True)


@pytest.mark.parametrize(
    ("activations", "size", "group"),
    [("a8", (2, 1), 5), ("a16", (1, 1), 4), pytest.param("a8", (4, 4), 8, marks=pytest.mark.slow),
     pytest.param("a16", (2, 2), 5, marks=pytest.mark.slow)],
)  # fmt: skip
def test_small_arrays_in_amaranth(activations, size, group):
    x, weights = operands(activations, 4, group, size)
    found = verify(MixedArray(activations, *size, group), x, weights)
    assert found.passed, found.first_mismatch


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["a8", "a16"])
def test_gates_of_the_array_for_3000_vectors(activations):
    x, weights = operands(activations, 192, 16)
    found = verify_gates(MixedArray(activations, 4, 4, 16), x, weights, LIBRARY)
    assert found.passed, found.first_mismatch
    assert found.cycles > 3000  # and 192 groups x 16 results


def test_a_wrong_zero_point_shows():
    x, weights = operands("a8", 3, 4, (1, 1))
    array = MixedArray("a8", 1, 1, 4)
    driven = waveforms(array, x, weights)
    driven.inputs["zero_0"][:] ^= driven.inputs["scale_0"] > 0
    found = simulate_amaranth(Design(array), {port.name: port for port in array.ports}, driven)
    assert not found.passed
    assert "y_0" in found.first_mismatch


@pytest.mark.parametrize("simulator", TOOLS)
@pytest.mark.parametrize("activations", ["a8", "a16"])
def test_verilog_of_the_array_for_3000_vectors(activations, simulator):
    groups = 192 if activations == "a8" or simulator == "verilator" else 24  # Icarus takes minutes for floats
    x, weights = operands(activations, groups, 16)
    found = verify(MixedArray(activations, 4, 4, 16), x, weights, simulator)
    assert found.passed, found.first_mismatch
    assert found.cycles > 16 * groups - 16


@pytest.mark.parametrize("activations", ["a8", "a16"])
def test_running_totals_end_where_the_model_does(activations):
    x, weights = operands(activations, 5, 16)
    token = np.ones(4, np.float32) if activations == "a8" else None
    assert np.array_equal(running_totals(x, weights)[-1], matmul(x, weights, token))


def test_widths():
    assert (product_bits("a8", 128), sum_bits("a8", 128)) == (19, 15)
    assert (product_bits("a16", 128), sum_bits("a16", 128)) == (32, 32)
    assert len(GroupSum("a8", 128).outputs["sum"]) == 19
    assert len(GroupSum("a8", 128, "uint4", 32).outputs["sum"]) == 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: MixedArray("a8", 4, 4, 7), "two positions per row"),
        (lambda x, w: MixedArray("a8", 0, 4, 7), "at least one row"),
        (lambda x, w: MixedArray("a4", 4, 4, 8), "a8"),
        (lambda x, w: Dequantiser("a8", 8192, 4), "holds 24"),
        (lambda x, w: GroupSum("a8", 128, "uint4", 18), "do not hold"),
        (lambda x, w: waveforms(MixedArray("a16", 4, 4, 8), x, w), "float16"),
        (lambda x, w: waveforms(MixedArray("a8", 4, 3, 8), x, w), "3 columns"),
        (lambda x, w: waveforms(MixedArray("a8", 4, 4, 16), x, w), "groups of 16"),
        (lambda x, w: waveforms(MixedArray("a8", 4, 4, 8), x, replace(w, scale=w.scale / 3)), "half_scales"),
        (lambda x, w: single_of_scaled(None, Signal(25), 0, 0), "25 bits"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call(*operands("a8", 3, 8))


def test_unknown_simulator():
    x, weights = operands("a8", 3, 8)
    with pytest.raises(UnknownNameError):
        verify(MixedArray("a8", 4, 4, 8), x, weights, "modelsim")
