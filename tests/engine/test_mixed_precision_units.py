"""Multipliers for like comparisons: every pair of operands as gates, and the accumulator apart."""

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.engine import mixed_precision_units as units
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library
from bitwright.engine.standalone_units import logic_gates

LIBRARY = find_library("predictive-28nm")


def outputs(unit, a, b, lanes=2048):
    netlist = logic_gates(unit, LIBRARY).netlist(LIBRARY)
    rows = -(-a.size // lanes)
    found = simulate(netlist, {"a": np.resize(a, (rows, lanes)), "b": np.resize(b, (rows, lanes))})
    return found.outputs["result"].reshape(-1)[: a.size].astype(np.int64) & ((1 << unit.result_bits) - 1)


@pytest.mark.parametrize(
    ("unit", "low", "high"),
    [(units.array_multiplier(8, 8), -128, 128), (units.array_multiplier(8, 4, False), 0, 16),
     (units.array_multiplier(8, 4), -8, 8), (units.booth_multiplier(8), -128, 128)], ids=lambda each: str(each)[:40],
)  # fmt: skip
def test_every_pair(unit, low, high):
    a, b = (grid.reshape(-1) for grid in np.meshgrid(np.arange(-128, 128), np.arange(low, high), indexing="ij"))
    assert np.array_equal(outputs(unit, a, b), (a * b) & ((1 << unit.result_bits) - 1))


def test_normal_halves_times_every_integer():
    """All normal numbers of both signs: exact, and truncated to ten fraction bits."""
    words = np.array([word for word in range(1 << 16) if 0 < (word >> 10) & 31 < 31])
    values = np.abs(words.astype(np.uint16).view(np.float16).astype(np.float64))
    exact, short = units.half_by_uint4_normal(), units.half_by_uint4_truncating()
    for integer in range(16):
        b = np.full(words.size, integer)
        found = outputs(exact, words, b, 8192)
        magnitude = (1 + (found & 0x3FFF) / 2**14) * np.exp2(((found >> 14) & 63) - 15.0)
        if not integer:
            assert not found.any()
            continue
        assert np.array_equal(magnitude, values * integer)
        assert np.array_equal(found >> 20, words >> 15)
        found = outputs(short, words, b, 8192)
        ulp = np.exp2(np.floor(np.log2(values * integer)) - 10)
        inside = values * integer < 2.0**16
        found_values = np.abs(found.astype(np.uint16).view(np.float16).astype(np.float64))
        assert np.array_equal(found_values[inside], (np.floor(values * integer / ulp) * ulp)[inside])


def test_accumulator_apart():
    unit = units.array_multiplier(8, 4, False)
    report = units.accumulating_apart(unit, LIBRARY)
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (50, 64)), rng.integers(0, 16, (50, 64))
    found = simulate(report.netlist(LIBRARY), {"a": a, "b": b}).signed_output("result", 32)
    assert np.array_equal(found[2:], np.cumsum(a * b, axis=0)[:-2])  # after the registers of inputs and result


def test_bad_input():
    with pytest.raises(InputError, match="two bits each"):
        units.booth_multiplier(7)
    with pytest.raises(InputError, match="12 bits or more"):
        units.accumulating_apart(units.array_multiplier(8, 4, False), LIBRARY, 11)
