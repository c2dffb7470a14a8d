"""Floating-point additions as gates against numpy, and the units that accumulate with them."""

import numpy as np
import pytest
from amaranth.hdl import Module, Signal, signed, unsigned

from bitwright.core.errors import InputError
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl.arithmetic import Component, rtlil_text
from bitwright.engine.rtl.floating_units import (
    BlockDotProduct,
    HalfMultiplyAccumulate,
    add_encodings,
    add_floats,
    float_of_integer,
)
from bitwright.engine.standalone_units import unit_gates, unit_power
from bitwright.engine.synthesis import synthesise

LIBRARY = find_library("predictive-28nm")
CORNERS = np.array(
    [0, 1, 2, 0x7FFFFF, 0x800000, 0x800001, 0xFFFFFF, 0x33800000, 0x34000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001,
     0x4B7FFFFF, 0x4B800000, 0x73000000, 0x7F7FFFFE, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000], np.int64
)  # fmt: skip


class Logic(Component):
    """A function of two words, without registers."""

    name = "unit"

    def __init__(self, function, a, b, bits):
        super().__init__()
        self.function = function
        self.add_input("a", a)
        self.add_input("b", b)
        self.add_output("result", unsigned(bits))

    def elaborate(self):
        module = Module()
        module.d.comb += self.outputs["result"].eq(self.function(module, self.inputs["a"], self.inputs["b"]))
        return module


def outputs(component, a, b, lanes=4096):
    netlist = synthesise(rtlil_text(component), "unit", LIBRARY).netlist(LIBRARY)
    rows = -(-a.size // lanes)
    drive = {name: np.resize(words, (rows, lanes)).astype(np.int64) for name, words in (("a", a), ("b", b))}
    return simulate(netlist, drive).outputs["result"].reshape(-1)[: a.size]


def same(words, expected):
    """Equal bit for bit, except that any NaN will do where one is expected."""
    nan = np.isnan(expected)
    found = words.astype(np.uint32)
    return np.where(nan, np.isnan(found.view(np.float32)), found == expected.view(np.uint32))


def test_binary32_sums_are_those_of_numpy():
    rng, count = np.random.default_rng(0), 100_000
    signed_corners = np.concatenate([CORNERS, CORNERS | 1 << 31])
    corners = [grid.reshape(-1) for grid in np.meshgrid(signed_corners, signed_corners)]
    x, y = (rng.integers(0, 1 << 32, count) for _ in range(2))
    near = np.clip((x & 0x7F800000) + (rng.integers(-28, 29, count) << 23), 0, 0x7F000000)
    near |= rng.integers(0, 1 << 23, count) | (rng.integers(0, 2, count) << 31)  # exponents that overlap
    opposite = ((x ^ 1 << 31) + rng.integers(-4, 5, count)) & 0xFFFFFFFF  # cancellation
    tiny = rng.integers(0, 3 << 23, count) | (rng.integers(0, 2, count) << 31)
    a = np.concatenate([corners[0], x, x, x, tiny])
    b = np.concatenate([corners[1], y, near, opposite, np.roll(tiny, 7)])
    with np.errstate(all="ignore"):
        expected = a.astype(np.uint32).view(np.float32) + b.astype(np.uint32).view(np.float32)
    assert same(outputs(Logic(add_floats, unsigned(32), unsigned(32), 32), a, b), expected).all()


def test_half_precision_sums_are_those_of_numpy():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 1 << 16, (2, 200_000))
    with np.errstate(all="ignore"):
        expected = a.astype(np.uint16).view(np.float16) + b.astype(np.uint16).view(np.float16)

    def add(module, x, y):
        return add_floats(module, x, y, 5, 10)

    found = outputs(Logic(add, unsigned(16), unsigned(16), 16), a, b).astype(np.uint16)
    nan = np.isnan(expected)
    assert np.isnan(found.view(np.float16)[nan]).all()
    assert np.array_equal(found[~nan], expected[~nan].view(np.uint16))


def test_scaled_integers_round_once():
    integers, exponents = (grid.reshape(-1) for grid in np.meshgrid(np.arange(-2048, 2048), np.arange(-165, 130, 2)))
    with np.errstate(over="ignore"):
        expected = np.ldexp(integers.astype(np.float64), exponents).astype(np.float32)
    found = outputs(Logic(float_of_integer, signed(12), signed(10), 32), integers, exponents)
    assert same(found, expected).all()


def streams(component, drive, cycles):
    """The sums that hold the words of each cycle."""
    late = component.latency
    padded = {name: np.concatenate([words, words[-late:]]).astype(np.int64) for name, words in drive.items()}
    netlist = unit_gates(component, LIBRARY).netlist(LIBRARY)
    return simulate(netlist, padded).outputs["sum"][late : cycles + late]


def running(first, addends):
    total, found = np.zeros(addends.shape[1], np.float32), []
    with np.errstate(all="ignore"):
        for start, addend in zip(first, addends, strict=True):
            total = np.where(start, np.float32(0), total) + addend
            found.append(total)
    return np.array(found)


@pytest.mark.parametrize(
    ("bits", "block"), [(4, 8), pytest.param(6, 5, marks=pytest.mark.slow), pytest.param(4, 32, marks=pytest.mark.slow)]
)
def test_block_dot_products(bits, block):
    rng, shape = np.random.default_rng(bits), (40, 256)
    largest = (1 << (bits - 1)) - 1
    a, b = rng.integers(-largest, largest + 1, (2, block, *shape))
    a[:, :5], b[:, :5] = largest, largest  # extreme blocks, blocks of zeros, of one element
    b[:, 1], a[:, 2], a[1:, 3] = -largest, 0, 0
    exponents = rng.integers(0, 255, (2, *shape))
    exponents[:, :, :128] = 127 + rng.integers(-6, 7, (2, shape[0], 128))
    exponents[:, :, 128:160] = rng.integers(0, 70, (2, shape[0], 32))  # subnormal sums
    first = rng.random(shape) < 0.1
    first[0] = True
    drive = {"first": first, "exponent_a": exponents[0], "exponent_b": exponents[1]}
    drive |= {f"{side}_{at}": words[at] for side, words in (("a", a), ("b", b)) for at in range(block)}
    places = exponents.sum(0) - 2 * (127 + bits - 2)
    with np.errstate(over="ignore"):
        addends = np.ldexp((a * b).sum(0).astype(np.float64), places).astype(np.float32)
    expected = running(first, addends)
    assert same(streams(BlockDotProduct(bits, block), drive, shape[0]), expected).all()


def test_half_products_accumulate_exactly():
    rng, shape = np.random.default_rng(3), (40, 256)
    x, y = (rng.normal(0, 30, shape).astype(np.float16) for _ in range(2))
    x[:, ::7] = 0
    first = rng.random(shape) < 0.1
    first[0] = True
    drive = {"first": first, "a": x.view(np.uint16), "b": y.view(np.uint16)}
    expected = running(first, x.astype(np.float32) * y.astype(np.float32))
    assert same(streams(HalfMultiplyAccumulate(), drive, shape[0]), expected).all()
    busy = {name: words.astype(np.int64) for name, words in drive.items()}
    idle = {name: np.zeros(shape, np.int64) for name in drive}
    powers = [unit_power(HalfMultiplyAccumulate(), LIBRARY, words) for words in (busy, idle)]
    assert powers[0].energy_j_per_cycle > 2 * powers[1].energy_j_per_cycle
    assert powers[1].combinational_j == 0  # nothing moves
    assert powers[1].clock_j > 0


def test_impossible_units():
    with pytest.raises(InputError, match="2 to 256"):
        BlockDotProduct(4, 1)
    with pytest.raises(InputError, match="2 to 8 bits"):
        BlockDotProduct(9, 32)
    with pytest.raises(InputError, match="25 bits"):
        float_of_integer(None, Signal(signed(25)), Signal(signed(10)))
    with pytest.raises(InputError, match="power of two in number"):
        add_encodings(None, Signal(8), Signal(8), 4, 3, True, 0x7C)
