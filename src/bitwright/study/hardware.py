"""The engine part of a study: RTL, gates, timing, and the switching energy of the model's own operands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.core import cache
from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.progress import progress
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.evaluate import evaluate
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.liberty import Library
from bitwright.engine.libraries import find_library
from bitwright.engine.netlist import Netlist
from bitwright.engine.power import activity_power
from bitwright.engine.rtl import OUTPUT_STAGE, PE, TOP, generate
from bitwright.engine.synthesis import ArrayReport, synthesise_array
from bitwright.engine.systolic import SystolicArray, cycles
from bitwright.engine.timing import analyse_timing
from bitwright.engine.yosys import yosys_version
from bitwright.study.file import EngineSection, Study
from bitwright.study.quality import Operands
from bitwright.study.result import Gates

# Part of the cache key of simulated activity: increase when the stimulus or the energy model changes.
_ACTIVITY_VERSION = 3
_LANES = 64
_TILES = 2


@dataclass(frozen=True)
class BuiltEngine:
    """An engine with its gates; energy of the whole array per cycle (J) while it works, by phase, and while it waits.

    There is no clock gating: in a cycle in which the array waits, the clock pins of its flip-flops still cost `idle_j`.
    """

    array: SystolicArray
    gates: Gates
    switching_j_per_cycle: Mapping[str, float]
    idle_j_per_cycle: float
    leakage_w: float


def describe_array(section: EngineSection) -> SystolicArray:
    """The array a study describes."""
    return SystolicArray(
        rows=section.rows,
        columns=section.columns,
        processing_element=section.processing_element,
        a_bits=section.operand_bits,
        b_bits=section.operand_bits,
        accumulator_bits=section.accumulator_bits,
    )


def check_engines(study: Study, folder: Path, depth: int) -> None:
    """Check what building the engines needs before any long step; `depth` is the longest sum of products.

    Raises InputError for an impossible array, an accumulator that can overflow or an unusable cell library, ToolError
    when there is no Yosys.
    """
    yosys_version()
    for section in study.engines:
        describe_array(section)
        needed = (depth * 127 * 127).bit_length() + 1
        if section.accumulator_bits < needed:
            raise InputError(
                f"Engine {section.name}: {section.accumulator_bits} accumulator bits can overflow: sums of {depth} "
                f"INT8 products occur, which take {needed} bits."
            )
    for name in study.libraries:
        _ = find_library(_place(name, folder)).mappable


def build_engine(
    study: Study, section: EngineSection, library_name: str, folder: Path, operands: Sequence[Operands]
) -> BuiltEngine:
    """Generate, synthesise, time and simulate one engine in one library; expensive results come from the cache.

    Raises BitwrightError when the netlist, driven with the model's operands, disagrees with the exact evaluation.
    """
    library = find_library(_place(library_name, folder))
    array = describe_array(section)
    verilog = generate(array)
    report = synthesise_array(verilog, TOP, library, objective=study.objective)
    activity = {
        phase: _cached_activity(array, report, library, operands, rows, study.seed, f"{section.name}, {phase}")
        for phase, rows in (
            ("prefill", min(study.workload.batch * study.workload.prompt, array.rows)),
            ("decode", min(study.workload.batch, array.rows)),
        )
    }
    gates = _figures(section, Path(library_name).name, array, report, verilog, activity)
    switching = {phase: entry["energy_j"] for phase, entry in activity.items()}
    return BuiltEngine(array, gates, switching, activity["decode"]["clock_j"], report.leakage_w)


def _place(library: str, folder: Path) -> str:
    """A library's name, or its path relative to the study file."""
    inside = folder / library
    return str(inside) if inside.is_file() else library


def _figures(
    section: EngineSection, library: str, array: SystolicArray, report: ArrayReport, verilog: str,
    activity: Mapping[str, Mapping[str, Any]],
) -> Gates:  # fmt: skip
    element, stage = report.parts[PE], report.parts[OUTPUT_STAGE]
    count = array.rows * array.columns
    if element.maximum_frequency_hz is None:
        raise BitwrightError(f"The processing element of {section.name!r} has no register-to-register path to time.")
    frequency = 1 / report.period_s
    peak = 2 * count * frequency
    source = f"{library} cells, {element.tool}, before placement"

    def synthesised(value: float, unit: str, note: str = "") -> Quantity:
        return Quantity(value, unit, Evidence.SYNTHESISED, f"{source}{note}")

    return Gates(
        engine=section.name,
        library=library,
        element_area=synthesised(element.area_um2, "um2"),
        array_area=synthesised(report.area_um2, "um2", ", buffer and vector unit not included"),
        element_max_frequency=synthesised(element.maximum_frequency_hz, "Hz", ", fastest netlist of the search"),
        max_frequency=synthesised(frequency, "Hz", f", whole array, best {element.objective}"),
        peak=synthesised(peak / 1e12, "TOP/s", ", two operations per multiply-accumulate"),
        density=synthesised(peak / 1e12 / (report.area_um2 / 1e6), "TOP/s/mm2"),
        leakage=synthesised(report.leakage_w, "W"),
        recipe=element.recipe,
        critical_path=activity["prefill"]["critical_path"],
        areas={
            name: synthesised(area, "um2")
            for name, area in (
                ("elements, logic", count * element.combinational_area_um2),
                ("elements, registers", count * element.sequential_area_um2),
                ("output stages", report.instances[OUTPUT_STAGE] * stage.area_um2),
                ("skew and control", report.glue.area_um2),
            )
        },
        verilog=verilog,
        checks=tuple(
            f"netlist of {entry['cells']:,} cells simulated over {entry['cycles']:,} cycles x {entry['streams']} "
            f"streams of the model's operands ({phase}): {entry['results']:,} results equal the exact evaluation"
            for phase, entry in activity.items()
        ),
    )


def _cached_activity(
    array: SystolicArray, report: ArrayReport, library: Library, operands: Sequence[Operands], rows: int, seed: int,
    description: str,
) -> dict[str, Any]:  # fmt: skip
    netlists = [report.glue.netlist_json, *(part.netlist_json for part in report.parts.values())]
    sample = hashlib.sha256()
    for entry in operands:
        sample.update(entry.activations.tobytes() + entry.weights.tobytes())
    inputs = {
        "version": _ACTIVITY_VERSION, "netlists": [text.encode() for text in netlists], "library": library.digest,
        "operands": sample.digest(), "rows": rows, "seed": seed, "array": repr(array),
    }  # fmt: skip

    def compute() -> dict[str, Any]:
        return simulate_activity(array, report.netlist(library), operands, rows, seed, report.period_s, description)

    result: dict[str, Any] = cache.get_or_compute("activity", inputs, compute)
    return result


def simulate_activity(
    array: SystolicArray, netlist: Netlist, operands: Sequence[Operands], rows: int, seed: int, period_s: float,
    description: str,
) -> dict[str, Any]:  # fmt: skip
    """Run the array's netlist on tiles of the model's operands, 64 at once, and take the energy of its switching.

    Tiles are drawn from the layers in proportion to their multiply-accumulates, so that the mean energy per cycle is
    that of the whole network's linear layers. Every result is compared with the exact evaluation.
    """
    depth = min(entry.activations.shape[1] for entry in operands)
    columns = _TILES * array.columns
    lanes = _draw_layers(operands, seed)
    # An array larger than the sample sees its rows and columns again, so that no part of it idles.
    tops = [entry.activations[_again(rows, entry.activations.shape[0]), :depth] for entry in lanes]
    sides = [entry.weights[:depth, _again(columns, entry.weights.shape[1])] for entry in lanes]
    left, right = np.stack(tops).astype(np.int64), np.stack(sides).astype(np.int64)
    with progress(f"Simulating gates of {description}", 1) as advance:
        stimulus = _stimulus(array, left, right)
        simulation = simulate(netlist, stimulus)
        results = _compare(array, simulation.outputs, left, right)
        timing = analyse_timing(netlist)
        power = activity_power(netlist, simulation.toggles, simulation.intervals, period_s, timing)
        advance(1)
    path = timing.critical_path
    return {
        "energy_j": power.energy_j_per_cycle,
        "combinational_j": power.combinational_j,
        "sequential_j": power.sequential_j,
        "clock_j": power.clock_j,
        "critical_path": f"{path[0].instance} to {path[-1].instance}, {len(path)} cells" if path else "",
        "cells": sum(netlist.cells.values()),
        "cycles": len(stimulus["valid"]),
        "streams": len(lanes),
        "results": results,
    }


def _again(wanted: int, available: int) -> NDArray[np.int64]:
    return np.arange(wanted) % available


def _draw_layers(operands: Sequence[Operands], seed: int) -> list[Operands]:
    """64 layers, each as often as its share of the multiply-accumulates (systematic sampling)."""
    weights = np.array([entry.macs for entry in operands], float)
    at = (np.arange(_LANES) + np.random.default_rng(seed).random()) / _LANES
    chosen = np.searchsorted(np.cumsum(weights) / weights.sum(), at)
    return [operands[int(index)] for index in chosen]


def _stimulus(array: SystolicArray, left: NDArray[np.int64], right: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Ports of the array over one product per lane: left (lanes, m, k), right (lanes, k, n), with m up to the rows."""
    lanes, m, depth = left.shape
    n = right.shape[2]
    total = int(cycles(array, m, n, depth))
    ports = ["rst", "valid", "last"]
    ports += [f"a_{row}" for row in range(array.rows)] + [f"b_{column}" for column in range(array.columns)]
    stimulus = {port: np.zeros((total, lanes), np.int64) for port in ports}
    for tile, first in enumerate(range(0, n, array.columns)):
        start = tile * (depth + array.rows)
        stimulus["valid"][start : start + depth] = 1
        stimulus["last"][start + depth - 1] = 1
        for row in range(m):
            stimulus[f"a_{row}"][start : start + depth] = left[:, row, :].T
        for column in range(min(array.columns, n - first)):
            stimulus[f"b_{column}"][start : start + depth] = right[:, :, first + column].T
    return stimulus


def _compare(
    array: SystolicArray, outputs: Mapping[str, NDArray[np.uint64]], left: NDArray[np.int64], right: NDArray[np.int64]
) -> int:
    """Check every result that leaves the netlist; returns how many."""
    lanes, m, depth = left.shape
    n = right.shape[2]
    shift = np.uint64(64 - array.accumulator_bits)
    expected = np.stack([evaluate(array, left[lane], right[lane]) for lane in range(lanes)])
    compared = 0
    for tile, first in enumerate(range(0, n, array.columns)):
        for column in range(min(array.columns, n - first)):
            start = tile * (depth + array.rows) + depth + array.rows + column + 1
            raw = outputs[f"result_{column}"][start : start + array.rows][::-1][:m]
            seen = (raw << shift).view(np.int64) >> np.int64(64 - array.accumulator_bits)
            if not np.array_equal(seen, expected[:, :, first + column].T):
                raise BitwrightError(
                    f"The netlist of the {array.rows}x{array.columns} {array.processing_element} array gives wrong "
                    f"results in column {column}: synthesis or simulation is at fault; its figures cannot be trusted."
                )
            compared += seen.size
    return compared
