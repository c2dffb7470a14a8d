"""The generated hardware in simulators, and that verification notices broken hardware."""

import shutil

import pytest

from bitwright.core.errors import ToolError, UnknownNameError
from bitwright.engine.rtl import Arithmetic
from bitwright.engine.systolic import SystolicArray
from bitwright.engine.verify import verify

VARIANTS = [("multiply-accumulate", "booth"), ("multiply-accumulate", "tool"), ("compressed-accumulation", "booth")]
icarus = pytest.mark.skipif(shutil.which("iverilog") is None, reason="Icarus Verilog is not installed")
verilator = pytest.mark.skipif(shutil.which("verilator") is None, reason="Verilator is not installed")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 5)])
def test_amaranth_simulation(variant, shape):
    report = verify(SystolicArray(*shape, variant[0], multiplier=variant[1]), vectors=200, simulator="amaranth")
    assert report.passed, report
    assert report.vectors >= 200


@pytest.mark.parametrize("element", ["multiply-accumulate", "compressed-accumulation"])
def test_other_widths(element):
    array = SystolicArray(2, 3, element, a_bits=4, b_bits=7, accumulator_bits=21)
    assert verify(array, seed=1, vectors=150, simulator="amaranth").passed


@pytest.mark.eda
@icarus
@pytest.mark.parametrize("variant", VARIANTS)
def test_icarus_simulation(variant):
    array = SystolicArray(4, 4, variant[0], multiplier=variant[1])
    report = verify(array, seed=2, vectors=1000, simulator="icarus")
    assert report.passed, report


@pytest.mark.eda
@pytest.mark.slow
@icarus
@pytest.mark.parametrize("variant", VARIANTS)
def test_icarus_simulation_of_an_8x8_array(variant):
    array = SystolicArray(8, 8, variant[0], multiplier=variant[1])
    assert verify(array, vectors=3000, simulator="icarus").passed


@pytest.mark.eda
@verilator
def test_verilator_simulation():
    assert verify(SystolicArray(3, 2, "compressed-accumulation"), vectors=300, simulator="verilator").passed


@pytest.mark.parametrize("simulator", ["amaranth", pytest.param("icarus", marks=[pytest.mark.eda, icarus])])
def test_broken_hardware_is_noticed(monkeypatch, simulator):
    right = Arithmetic.full_adders

    def wrong(self, words, bits):
        total, carry = right(self, words, bits)
        return (total, self._word("wrong", bits, carry & ~(1 << 9))) if self._rows == 2 else (total, carry)

    monkeypatch.setattr(Arithmetic, "full_adders", wrong)
    report = verify(SystolicArray(2, 2, "compressed-accumulation"), vectors=50, simulator=simulator)
    assert not report.passed
    assert "expected" in report.first_mismatch


def test_late_results_are_noticed(monkeypatch):
    monkeypatch.setattr("bitwright.engine.rtl.OutputStationaryArray._skewed", lambda self, module, port, accept, d: 0)
    assert not verify(SystolicArray(2, 2), vectors=50, simulator="amaranth").passed


def test_bad_simulators(monkeypatch):
    with pytest.raises(UnknownNameError, match="icarus"):
        verify(SystolicArray(2, 2), simulator="modelsim")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolError, match="not installed"):
        verify(SystolicArray(2, 2), simulator="icarus")
