"""The engine part of a study: RTL, gates, timing, and the switching energy of the model's own operands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.core import cache
from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.progress import progress
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.digit_profiles import measure_profile
from bitwright.engine.engine_gates import part_names
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.liberty import Library
from bitwright.engine.libraries import find_library
from bitwright.engine.mapping import serial_figures
from bitwright.engine.netlist import Netlist
from bitwright.engine.network_cost import OperandStatistics
from bitwright.engine.power import activity_power
from bitwright.engine.rtl import CHAIN_ELEMENT, OUTPUT_STAGE, PE, TOP, generate
from bitwright.engine.stimulus import stimulus
from bitwright.engine.synthesis import ArrayReport, synthesise_array
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.timing import analyse_timing
from bitwright.engine.waveforms import Waveforms
from bitwright.engine.widths import check_depth
from bitwright.engine.yosys import yosys_version
from bitwright.study.file import EngineSection, FormatSection, Study, describe_engine, sum_bits
from bitwright.study.quality import Operands, model_source
from bitwright.study.result import Gates

# Part of the cache key of simulated activity: increase when the stimulus or the energy model changes.
_ACTIVITY_VERSION = 5
_STREAMS = 64
_SERIAL_STREAMS = 16  # their stimulus has a port per element
_PORT_VALUES = 1 << 26  # port values of all streams held at once, 8 bytes each
_TILES = 2
_STREAMED_ROWS = 16  # rows of A of an engine that takes them one after the other
_MODEL_BITS = 8
_LABELS = {PE: "elements", CHAIN_ELEMENT: "chain links", "digit_stream": "digit streams", OUTPUT_STAGE: "output stages"}

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine with its gates; energy of the whole array per cycle (J) while it works, by phase, and while it waits.

    On a serial engine `switching_j_per_cycle` holds a phase with the left operand (activations) encoded, and
    "PHASE, right encoded" with the right one; `statistics` are the digits of its operands, product by product. There
    is no clock gating: in a cycle in which the array waits, the clock pins of its flip-flops cost `idle_j_per_cycle`.
    """

    engine: TensorEngine
    gates: Gates
    switching_j_per_cycle: Mapping[str, float]
    idle_j_per_cycle: float
    leakage_w: float
    statistics: OperandStatistics | None = None


def check_engines(study: Study, folder: Path, depths: Mapping[str, int]) -> None:
    """Check what building the engines needs before any long step; `depths`: the longest sum of products by formats.

    Raises InputError for an engine without hardware, an accumulator or state that can overflow or an unusable cell
    library, ToolError when there is no Yosys.
    """
    yosys_version()
    for section in study.engines:
        engine, depth = describe_engine(section, study.model), depths[section.formats]
        needed = sum_bits(study.model.format(section.formats), depth)
        if engine.accumulator_bits < needed:
            raise InputError(
                f"Engine {section.name}: {engine.accumulator_bits} accumulator bits can overflow: sums of {depth} "
                f"products of {section.formats} codes occur, which take {needed} bits."
            )
        try:
            check_hardware(engine)
            check_depth(engine.nest, depth)
            if engine.serial:
                serial_figures(engine)
        except InputError as error:
            raise InputError(f"Engine {section.name}: {error}") from None
        if engine.serial and section.formats != "int8":
            raise InputError(
                f"Engine {section.name}: the digits that a serial engine's cycles depend on are measured for int8, not "
                f"for {section.formats}."
            )
        if engine.serial and (engine.a_bits, engine.b_bits) != (_MODEL_BITS, _MODEL_BITS):
            raise InputError(
                f"Engine {section.name}: the digits of the model's operands are counted at {_MODEL_BITS} bits, so a "
                f"serial engine has a_bits and b_bits of {_MODEL_BITS}, not {engine.a_bits} and {engine.b_bits}."
            )
    for name in study.libraries:
        _ = find_library(_place(name, folder)).mappable


def build_engine(
    study: Study, section: EngineSection, library_name: str, folder: Path, operands: Sequence[Operands]
) -> BuiltEngine:
    """Generate, synthesise, time and simulate one engine in one library; expensive results come from the cache.

    `operands` are words of the engine's formats. Raises BitwrightError when the netlist, driven with the model's
    operands, disagrees with the exact evaluation.
    """
    library = find_library(_place(library_name, folder))
    engine = describe_engine(section, study.model)
    group = longest_tile(study.model.format(section.formats))
    verilog = generate(engine)
    report = synthesise_array(verilog, TOP, library, part_names(engine), study.objective)
    tokens = {"prefill": study.workload.batch * study.workload.prompt, "decode": study.workload.batch}
    activity = {
        phase + (", right encoded" if turned else ""): _cached_activity(
            engine, report, library, operands, group, count, turned, study.seed, f"{section.name}, {phase}"
        )
        for phase, count in tokens.items()
        for turned in ((False, True) if engine.serial else (False,))
    }
    gates = _figures(section, Path(library_name).name, engine, report, verilog, activity, operands)
    switching = {phase: entry["energy_j"] for phase, entry in activity.items()}
    statistics = _operand_statistics(study, folder, engine) if engine.serial else None
    return BuiltEngine(engine, gates, switching, activity["decode"]["clock_j"], report.leakage_w, statistics)


def _operand_statistics(study: Study, folder: Path, engine: TensorEngine) -> OperandStatistics:
    """Digits of both operands of every product of the model, attention included, taken while it runs on the text."""
    from bitwright.models.operand_statistics import model_profiles, statistics_of

    text = None if study.model.text == "default" else folder / study.model.text
    group = serial_figures(engine).group
    profiles = model_profiles(
        model_source(study.model, folder), engine.encoding, _MODEL_BITS, group, text=text, seed=study.seed
    )
    return statistics_of(profiles)


def _place(library: str, folder: Path) -> str:
    """A library's name, or its path relative to the study file."""
    inside = folder / library
    return str(inside) if inside.is_file() else library


def _figures(
    section: EngineSection, library: str, engine: TensorEngine, report: ArrayReport, verilog: str,
    activity: Mapping[str, Mapping[str, Any]], operands: Sequence[Operands],
) -> Gates:  # fmt: skip
    element = report.parts[part_names(engine)[0]]
    if element.maximum_frequency_hz is None:
        raise BitwrightError(f"The processing element of {section.name!r} has no register-to-register path to time.")
    frequency = 1 / report.period_s
    macs, note = _macs_per_cycle(engine, operands)
    peak = 2 * macs * frequency
    source = f"{library} cells, {element.tool}, before placement"

    def synthesised(value: float, unit: str, note: str = "") -> Quantity:
        return Quantity(value, unit, Evidence.SYNTHESISED, f"{source}{note}")

    areas: dict[str, float] = {}
    for name, part in report.parts.items():
        count, label = report.instances[name], _LABELS[name]
        if name in (PE, CHAIN_ELEMENT):
            areas[f"{label}, logic"] = count * part.combinational_area_um2
            areas[f"{label}, registers"] = count * part.sequential_area_um2
        else:
            areas[label] = count * part.area_um2
    areas["skew and control"] = report.glue.area_um2
    return Gates(
        engine=section.name,
        library=library,
        formats=section.formats,
        element_area=synthesised(element.area_um2, "um2"),
        array_area=synthesised(report.area_um2, "um2", ", buffer and vector unit not included"),
        element_max_frequency=synthesised(element.maximum_frequency_hz, "Hz", ", fastest netlist of the search"),
        max_frequency=synthesised(frequency, "Hz", f", whole array, best {element.objective}"),
        peak=synthesised(peak / 1e12, "TOP/s", f", two operations per multiply-accumulate{note}"),
        density=synthesised(peak / 1e12 / (report.area_um2 / 1e6), "TOP/s/mm2", note),
        leakage=synthesised(report.leakage_w, "W"),
        recipe=element.recipe,
        critical_path=activity["prefill"]["critical_path"],
        areas={name: synthesised(area, "um2") for name, area in areas.items()},
        verilog=verilog,
        checks=tuple(
            f"netlist of {entry['cells']:,} cells simulated over {entry['cycles']:,} cycles x {entry['streams']} "
            f"streams of the model's operands ({phase}): {entry['results']:,} results equal the exact evaluation"
            for phase, entry in activity.items()
        ),
    )


def _macs_per_cycle(engine: TensorEngine, operands: Sequence[Operands]) -> tuple[float, str]:
    """Multiply-accumulates of the whole array per cycle when nothing waits, and what that rests on.

    A serial engine takes as long as the digits want: those of the model's weights or activations, whichever are fewer.
    """
    if not engine.serial:
        return engine.macs_per_cycle, ""
    figures = serial_figures(engine)

    def issue_cycles(matrices: Sequence[NDArray[np.integer[Any]]]) -> float:
        means = [measure_profile(each, engine.encoding, _MODEL_BITS, figures.group).issue_cycles for each in matrices]
        return float(np.average(means, weights=[entry.macs for entry in operands]))

    each = {
        "activations": issue_cycles([entry.activations for entry in operands]),
        "weights": issue_cycles([np.ascontiguousarray(entry.weights.T) for entry in operands]),
    }
    side = min(each, key=lambda name: each[name])
    streams = engine.rows * engine.columns * figures.lanes
    return streams / each[side], f", {each[side]:.2f} cycles per multiply-accumulate with the model's {side} encoded"


def longest_tile(formats: FormatSection) -> int | None:
    """Positions of K that the linear layers sum on the array at a time: a group of scales, or None for all."""
    if formats.built_in:
        return None
    from bitwright.models.format_workload import scale_groups

    return scale_groups(formats.assignment).linear.k


def _cached_activity(
    engine: TensorEngine, report: ArrayReport, library: Library, operands: Sequence[Operands], group: int | None,
    tokens: int, turned: bool, seed: int, description: str,
) -> dict[str, Any]:  # fmt: skip
    netlists = [report.glue.netlist_json, *(part.netlist_json for part in report.parts.values())]
    sample = hashlib.sha256()
    for entry in operands:
        sample.update(entry.activations.tobytes() + entry.weights.tobytes())
    inputs = {
        "version": _ACTIVITY_VERSION, "netlists": [text.encode() for text in netlists], "library": library.digest,
        "operands": sample.digest(), "group": group, "rows": _lines(engine, tokens, turned), "turned": turned,
        "seed": seed, "engine": repr(engine),
    }  # fmt: skip

    def compute() -> dict[str, Any]:
        netlist = report.netlist(library)
        tiles = limited(operands, group, seed)
        return simulate_activity(engine, netlist, tiles, tokens, turned, seed, report.period_s, description)

    result: dict[str, Any] = cache.get_or_compute("activity", inputs, compute)
    return result


def limited(operands: Sequence[Operands], group: int | None, seed: int) -> list[Operands]:
    """The operands with one group of K positions, drawn for every layer: sums end where a scale does."""
    rng = np.random.default_rng(seed)

    def cut(entry: Operands) -> Operands:
        size = min(group or len(entry.weights), len(entry.weights))
        start = int(rng.integers(len(entry.weights) // size)) * size
        part = slice(start, start + size)
        return replace(entry, activations=entry.activations[:, part], weights=entry.weights[part])

    return [cut(entry) for entry in operands]


def _lines(engine: TensorEngine, tokens: int, turned: bool) -> int:
    """Tokens that a simulated tile has: as many as the array takes at a time."""
    if turned:
        return min(tokens, engine.columns)
    return min(tokens, _STREAMED_ROWS if engine.dataflow in ("ws", "tree") else engine.rows)


def simulate_activity(
    engine: TensorEngine, netlist: Netlist, operands: Sequence[Operands], tokens: int, turned: bool, seed: int,
    period_s: float, description: str,
) -> dict[str, Any]:  # fmt: skip
    """Run the engine's netlist on tiles of the model's operands, many at once, and take the energy of its switching.

    Tiles are drawn from the layers in proportion to their multiply-accumulates, so that the mean energy per cycle is
    that of the whole network's linear layers; `turned` gives the weights the place of the left operand. Every result is
    compared with the exact evaluation. Streams that end earlier than the longest do not count after their end.
    """
    with progress(f"Simulating gates of {description}", 1) as advance:
        waves = drive(engine, operands, _lines(engine, tokens, turned), turned, seed)
        simulation = simulate(netlist, _inputs(waves))
        results = compare_streams(engine, simulation.outputs, waves)
        timing = analyse_timing(netlist)
        driven = sum(wave.cycles for wave in waves)
        power = activity_power(netlist, simulation.toggles, driven, period_s, timing)
        advance(1)
    path = timing.critical_path
    return {
        "energy_j": power.energy_j_per_cycle,
        "combinational_j": power.combinational_j,
        "sequential_j": power.sequential_j,
        "clock_j": power.clock_j,
        "critical_path": f"{path[0].instance} to {path[-1].instance}, {len(path)} cells" if path else "",
        "cells": sum(netlist.cells.values()),
        "cycles": max(wave.cycles for wave in waves),
        "streams": len(waves),
        "results": results,
    }


def _again(wanted: int, available: int) -> NDArray[np.int64]:
    return np.arange(wanted) % available


def _draw_layers(operands: Sequence[Operands], seed: int, streams: int) -> list[Operands]:
    """Layers, each as often as its share of the multiply-accumulates (systematic sampling)."""
    weights = np.array([entry.macs for entry in operands], float)
    at = (np.arange(streams) + np.random.default_rng(seed).random()) / streams
    chosen = np.searchsorted(np.cumsum(weights) / weights.sum(), at)
    return [operands[int(index)] for index in chosen]


def drive(engine: TensorEngine, operands: Sequence[Operands], lines: int, turned: bool, seed: int) -> list[Waveforms]:
    """Waveforms of one product of `lines` tokens per stream, the engine's inputs quiet where nothing is driven."""
    depth = min(entry.activations.shape[1] for entry in operands)
    wanted = (1 if engine.serial else _TILES) * (engine.rows if turned else engine.columns)
    rng = np.random.default_rng(seed)

    def wave(entry: Operands) -> Waveforms:
        # An array larger than the sample sees its rows and columns again, so that no part of it idles.
        left = entry.activations[_again(lines, entry.activations.shape[0]), :depth].astype(np.int64)
        right = entry.weights[:depth, _again(wanted, entry.weights.shape[1])].astype(np.int64)
        return stimulus(engine, [(right.T, left.T) if turned else (left, right)], rng, noise=False).waveforms

    first = wave(operands[0])
    fitting = _PORT_VALUES // (first.cycles * len(first.inputs))
    streams = max(1, min(_SERIAL_STREAMS if engine.serial else _STREAMS, fitting))
    return [wave(entry) for entry in _draw_layers(operands, seed, streams)]


def _inputs(waves: Sequence[Waveforms]) -> dict[str, Integers]:
    """Input ports (cycles, streams): reset, then every stream up to its end and zeros after it."""
    before, length = waves[0].reset_cycles, max(wave.cycles for wave in waves)
    inputs = {
        name: np.stack([np.pad(wave.inputs[name], (before, length - wave.cycles)) for wave in waves], 1)
        for name in waves[0].inputs
    }
    reset = np.repeat(np.array([1, 0]), [before, length])
    return inputs | {waves[0].reset: np.repeat(reset[:, None], len(waves), axis=1)}


def compare_streams(engine: TensorEngine, outputs: Mapping[str, NDArray[np.uint64]], waves: Sequence[Waveforms]) -> int:
    """Check every output in every cycle in which it means something; returns how many results left the engine."""
    before = waves[0].reset_cycles
    results = 0
    for stream, wave in enumerate(waves):
        for name, expected in wave.expected.items():
            seen = outputs[name][before : before + wave.cycles, stream]
            mask = np.uint64((1 << wave.widths[name]) - 1)
            care = wave.care.get(name, np.ones(wave.cycles, bool))
            if (((seen ^ expected.view(np.uint64)) & mask).astype(bool) & care).any():
                raise BitwrightError(
                    f"The netlist of the {engine.rows}x{engine.columns} {engine.dataflow} engine {engine.nest.name!r} "
                    f"gives wrong results at {name!r}: synthesis or simulation is at fault; its figures cannot be "
                    "trusted."
                )
            results += int(care.sum()) if name.startswith("result_") and name != "result_valid" else 0
    return results
