"""The generated hardware in simulators, and that verification notices broken hardware."""

import shutil

import pytest
from amaranth.hdl import signed

from bitwright.core.errors import ToolError, UnknownNameError
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import Arithmetic
from bitwright.engine.rtl.grid import Grid
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.verify import verify, verify_netlist

icarus = pytest.mark.skipif(shutil.which("iverilog") is None, reason="Icarus Verilog is not installed")
verilator = pytest.mark.skipif(shutil.which("verilator") is None, reason="Verilator is not installed")
FRUGAL = ("opt4e", "carry_in_negation", "sign_free")


@pytest.mark.parametrize(
    "engine",
    [
        TensorEngine(1, 1), TensorEngine(3, 5, ("opt1",)), TensorEngine(4, 4, multiplier="tool"),
        TensorEngine(2, 3, ("opt1", "sign_free"), a_bits=4, b_bits=7, accumulator_bits=21),
        TensorEngine(2, 2, FRUGAL, encoding="ent"),
    ],
    ids=["1x1", "3x5", "tool", "other-widths", "serial"],
)  # fmt: skip
def test_amaranth_simulation(engine):
    report = verify(engine, vectors=200, simulator="amaranth")
    assert report.passed, report
    assert report.vectors >= 200


@pytest.mark.eda
@pytest.mark.slow
@icarus
@pytest.mark.parametrize("transformations", [(), ("opt1",), ("opt2",), ("opt4c",), FRUGAL], ids="-".join)
def test_icarus_simulation_of_an_8x8_array(transformations):
    assert verify(TensorEngine(8, 8, transformations), vectors=3000, simulator="icarus").passed


@pytest.mark.eda
@verilator
def test_verilator_simulation():
    assert verify(TensorEngine(3, 2, ("opt1",)), vectors=300, simulator="verilator").passed


@pytest.mark.parametrize(
    "engine", [TensorEngine(2, 2), TensorEngine(2, 2, ("opt4c", "sign_free"))], ids=["parallel", "serial"]
)
def test_netlist_simulation(engine):
    report = verify_netlist(engine, find_library("predictive-28nm"), vectors=60)
    assert report.passed, report


@pytest.mark.parametrize("simulator", ["amaranth", pytest.param("icarus", marks=[pytest.mark.eda, icarus])])
def test_broken_hardware_is_noticed(monkeypatch, simulator):
    right = Arithmetic.full_adders

    def wrong(self, words, bits):
        total, carry = right(self, words, bits)
        return total, self._word("wrong", signed(bits), carry & ~(1 << 9))

    monkeypatch.setattr(Arithmetic, "full_adders", wrong)
    report = verify(TensorEngine(2, 2, ("opt1",)), vectors=50, simulator=simulator)
    assert not report.passed
    assert "expected" in report.first_mismatch


def test_late_operands_are_noticed(monkeypatch):
    monkeypatch.setattr(Grid, "_skewed", lambda self, module, words, delay, name: dict(words))
    assert not verify(TensorEngine(2, 2), vectors=50, simulator="amaranth").passed


def test_waveforms_are_kept(tmp_path):
    verify(TensorEngine(1, 1), vectors=20, simulator="amaranth", vcd=tmp_path / "waves.vcd")
    assert "$enddefinitions" in (tmp_path / "waves.vcd").read_text()


def test_bad_simulators(monkeypatch):
    with pytest.raises(UnknownNameError, match="icarus"):
        verify(TensorEngine(2, 2), simulator="modelsim")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ToolError, match="not installed"):
        verify(TensorEngine(2, 2), simulator="icarus")


@pytest.mark.parametrize(("sequence", "bits"), [("opt2", 16), ("opt3", 17), ("opt4e", 16), ("opt4e", 20)])
def test_narrow_accumulators_give_no_false_alarm(sequence, bits):
    engine = TensorEngine(2, 2, (sequence,), accumulator_bits=bits)
    assert verify(engine, vectors=60, simulator="amaranth").passed
