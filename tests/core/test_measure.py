"""Measuring this machine: what comes out can be read back, and a busy machine is refused."""

import itertools

import pytest

from bitwright.core import measure
from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.machine import load_machine
from bitwright.core.quantity import Evidence

SMALL = {"size": 64, "stream_bytes": 2**20, "repeats": 1, "threads": 1}


def test_measured_machine_is_stored_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_DATA", str(tmp_path))
    measured, path = measure.measure_and_store(require_idle=False, **SMALL)
    assert path.is_relative_to(tmp_path)
    loaded = load_machine("this-machine")
    assert list(loaded.figures()) == list(measured.figures())
    cpu = loaded.device()
    assert cpu.kind == "cpu"
    assert cpu.compute.matrix["fp32"].value > 1e6
    assert cpu.main_memory.sustained.value > 1e6
    assert cpu.launch_overhead.value < 1e-3
    for row_name, figure in loaded.figures():
        if row_name.startswith("devices.cpu.compute"):
            assert figure.evidence is Evidence.EXECUTED
            assert "load average" in figure.source


def test_a_busy_machine_is_refused(monkeypatch):
    seconds = iter([0.0, 1.0])
    monkeypatch.setattr(measure, "_processor_seconds", lambda: (0.0, 1e6 * next(seconds)))
    with pytest.raises(BitwrightError, match=r"busy.*load average"):
        measure.measure_this_machine(**SMALL)


def test_a_wavering_probe_is_refused(monkeypatch):
    times = itertools.count(1)
    monkeypatch.setattr(measure, "_probe", lambda: float(next(times)))
    monkeypatch.setattr(measure, "_processor_seconds", lambda: (0.0, 0.0))
    with pytest.raises(BitwrightError, match="probe"):
        measure.measure_this_machine(**SMALL)
    marked = measure.measure_this_machine(**SMALL, require_idle=False)
    assert "busy" in marked.notes[0]


def test_bad_sizes():
    with pytest.raises(InputError, match="multiple of 8"):
        measure.measure_this_machine(size=17)
