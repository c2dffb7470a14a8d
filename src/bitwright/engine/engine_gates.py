"""What an engine costs in gates: area by part and by component, clock, and energy per multiply-accumulate.

Its parts (processing element, chain link, digit stream, output stage) are mapped once each and counted as often as the
engine has them. Clock and energy come from a small engine of the same parts, joined to one netlist: static timing, and
gate-level activity of normally distributed operands in 16 streams. The registers that skew operands around the parts
are either mapped too (`synthesise_engine`) or counted (`engine_gates`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as memory
from pathlib import Path

import numpy as np

from bitwright.core import cache
from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence
from bitwright.engine.evaluate import Integers
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.liberty import Library
from bitwright.engine.notation import print_nest
from bitwright.engine.power import energy_by_part
from bitwright.engine.rtl import TOP, generate, parts, top
from bitwright.engine.rtl.arithmetic import rtlil_text
from bitwright.engine.stimulus import stimulus
from bitwright.engine.synthesis import ArrayReport, Objective, synthesise_array
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.timing import analyse_timing
from bitwright.engine.yosys import yosys_version

_VERSION = 2
_STREAMS = 16
Powers = tuple[tuple[int, int], ...]
_SAMPLE_K = 768


@dataclass(frozen=True)
class EngineGates:
    """Gates of one engine in one library. Areas in um2 by part, energies per cycle (J) by part while it works.

    `period_s` is the static timing of the small engine. `macs_per_cycle` is what the operands of the sample let the
    engine do, with the drain of two rows only. The skew area is that of the small engine, scaled by register bits.
    """

    library: str
    instances: Mapping[str, int]
    part_area_um2: Mapping[str, float]
    part_energy_j: Mapping[str, float]
    skew_area_um2: float
    skew_energy_j: float
    period_s: float
    leakage_w: float
    macs_per_cycle: float
    recipe: str
    evidence: Evidence = Evidence.SYNTHESISED

    @property
    def area_um2(self) -> float:
        """Cell area of the whole engine."""
        return self.skew_area_um2 + sum(self.instances[name] * area for name, area in self.part_area_um2.items())

    @property
    def energy_j_per_cycle(self) -> float:
        """Dynamic energy of the whole engine per cycle."""
        return self.skew_energy_j + sum(self.instances[name] * joule for name, joule in self.part_energy_j.items())

    @property
    def energy_j_per_mac(self) -> float:
        """Dynamic energy and leakage per useful multiply-accumulate of the sample."""
        return (self.energy_j_per_cycle + self.leakage_w * self.period_s) / self.macs_per_cycle

    @property
    def macs_per_second(self) -> float:
        """Useful multiply-accumulates per second on the sample."""
        return self.macs_per_cycle / self.period_s

    @property
    def area_efficiency(self) -> float:
        """Multiply-accumulates per second and um2."""
        return self.macs_per_second / self.area_um2


def part_names(engine: TensorEngine) -> tuple[str, ...]:
    """Names of the engine's modules, the one that decides the clock first."""
    names = [part.name for part in parts(engine)]
    return tuple(sorted(names, key=("chain_element", "pe", "digit_stream", "output_stage").index))


def synthesise_engine(engine: TensorEngine, library: Library, objective: Objective = "area_delay") -> ArrayReport:
    """Map the whole engine, its skew registers and control included. Raises as `synthesis.synthesise_array`."""
    return synthesise_array(generate(engine), TOP, library, part_names(engine), objective)


def small_engine(engine: TensorEngine) -> TensorEngine:
    """An engine of the same parts with at most two rows and columns."""
    return replace(engine, rows=min(engine.rows, 2), columns=min(engine.columns, 2))


def part_counts(engine: TensorEngine) -> dict[str, int]:
    """How often the engine has each of its modules."""
    positions = engine.rows * engine.columns
    lanes = engine.nest.extent("lane")
    counts = {
        "pe": positions, "chain_element": positions * engine.depth, "digit_stream": engine.rows * lanes,
        "output_stage": engine.rows if engine.serial else engine.columns,
    }  # fmt: skip
    return {name: counts[name] for name in part_names(engine)}


def normal_products(engine: TensorEngine, streams: int = _STREAMS, seed: int = 0) -> list[tuple[Integers, Integers]]:
    """One product per stream of normal data: the largest of 2^20 samples would end the range (sigma = range / 4.9)."""
    rng = np.random.default_rng(seed)
    m = engine.rows if engine.dataflow not in ("ws", "tree") else 16
    k = max(_SAMPLE_K, 8 * engine.step) if engine.dataflow != "ws" else engine.depth

    def draw(shape: tuple[int, int], bits: int) -> Integers:
        top_value = (1 << (bits - 1)) - 1
        values = np.rint(rng.normal(0, top_value / 4.9, shape))
        return np.clip(values, -top_value - 1, top_value).astype(np.int64)

    return [(draw((m, k), engine.a_bits), draw((k, engine.columns), engine.b_bits)) for _ in range(streams)]


@dataclass(frozen=True)
class PartGates:
    """What the parts of an engine cost, whatever its rows and columns: area (um2), leakage (W) and energy per cycle (J)
    of one of each, and of what stands around them in the small engine ("skew"), whose register bits are a polynomial of
    rows and columns (`skew_powers`, `skew_coefficients`).
    """

    library: str
    rows: int
    columns: int
    depth: int
    lanes: int
    serial: bool
    area_um2: Mapping[str, float]
    leakage_w: Mapping[str, float]
    energy_j: Mapping[str, float]
    skew_powers: Powers
    skew_coefficients: tuple[float, ...]
    period_s: float
    macs_per_cycle: float
    recipe: str

    def skew_bits(self, rows: int, columns: int) -> float:
        """Register bits around the parts of an engine of that size."""
        terms = zip(self.skew_powers, self.skew_coefficients, strict=True)
        return sum(factor * float(rows**i * columns**j) for (i, j), factor in terms)


def part_gates(
    engine: TensorEngine, library: Library, objective: Objective = "area_delay",
    products: Sequence[tuple[Integers, Integers]] | None = None,
) -> PartGates:  # fmt: skip
    """Map and simulate the parts of an engine in a small one; cached by the engine's description and our sources.

    Parameters and errors as `engine_gates`.
    """
    sample = small_engine(engine)
    given = products or normal_products(sample)
    inputs = {
        "version": _VERSION, "sources": _sources(), "yosys": yosys_version(), "library": library.digest,
        "objective": objective, "engine": repr(sample), "nest": print_nest(sample.nest),
        "operands": [np.ascontiguousarray(matrix).tobytes() for pair in given for matrix in pair],
    }  # fmt: skip
    stored = cache.get_or_compute(
        "engine-gates", inputs, lambda: asdict(_part_gates(sample, library, objective, given))
    )
    powers = tuple((int(i), int(j)) for i, j in stored["skew_powers"])
    return PartGates(**{**stored, "skew_powers": powers, "skew_coefficients": tuple(stored["skew_coefficients"])})


@memory
def _sources() -> str:
    """Digest of the engine floor's sources: figures of another version of the hardware are not taken from the cache."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _part_gates(
    sample: TensorEngine, library: Library, objective: Objective, products: Sequence[tuple[Integers, Integers]]
) -> PartGates:
    report = synthesise_engine(sample, library, objective)
    measured = _measure(sample, report, library, products)
    powers, coefficients = skew_polynomial(sample)
    return PartGates(
        library.name, sample.rows, sample.columns, sample.depth, sample.nest.extent("lane"), sample.serial,
        {name: part.area_um2 for name, part in report.parts.items()} | {"skew": report.glue.area_um2},
        {name: part.leakage_w for name, part in report.parts.items()} | {"skew": report.glue.leakage_w},
        {(name or "skew"): joule for name, joule in measured.energy_j.items()}, powers, coefficients,
        report.period_s, measured.macs_per_cycle, report.parts[part_names(sample)[0]].recipe,
    )  # fmt: skip


def engine_gates(
    engine: TensorEngine, library: Library, objective: Objective = "area_delay",
    products: Sequence[tuple[Integers, Integers]] | None = None,
) -> EngineGates:  # fmt: skip
    """Area, clock and energy of an engine; expensive parts come from the cache.

    `products` drive the gates: operands (m, k), (k, n) of a small engine (`small_engine`), one product per stream, all
    of one shape; the default is `normal_products`. Raises InputError for engines without hardware and unusable
    libraries, BitwrightError when the netlist disagrees with the exact evaluation.
    """
    return compose(part_gates(engine, library, objective, products), engine.rows, engine.columns)


def compose(parts_of: PartGates, rows: int, columns: int) -> EngineGates:
    """The engine of `rows` x `columns` positions made of these parts."""
    positions = rows * columns
    counts = {
        "pe": positions, "chain_element": positions * parts_of.depth, "digit_stream": rows * parts_of.lanes,
        "output_stage": rows if parts_of.serial else columns,
    }  # fmt: skip
    instances = {name: counts[name] for name in parts_of.area_um2 if name != "skew"}
    skew = parts_of.skew_bits(rows, columns) / max(1.0, parts_of.skew_bits(parts_of.rows, parts_of.columns))
    leakage = skew * parts_of.leakage_w["skew"] + sum(
        count * parts_of.leakage_w[name] for name, count in instances.items()
    )
    return EngineGates(
        parts_of.library, instances, {name: parts_of.area_um2[name] for name in instances},
        {name: parts_of.energy_j[name] for name in instances}, skew * parts_of.area_um2["skew"],
        skew * parts_of.energy_j["skew"], parts_of.period_s, leakage,
        parts_of.macs_per_cycle * positions / (parts_of.rows * parts_of.columns), parts_of.recipe,
    )  # fmt: skip


@dataclass(frozen=True)
class _Measured:
    energy_j: Mapping[str, float]  # per instance of a part and cycle; "": everything around the parts
    macs_per_cycle: float


def _measure(
    engine: TensorEngine, report: ArrayReport, library: Library, products: Sequence[tuple[Integers, Integers]]
) -> _Measured:
    """Simulate the netlist of a small engine, one product per stream; every output is compared."""
    netlist = report.netlist(library)
    rng = np.random.default_rng(0)
    waves = [stimulus(engine, [pair], rng, noise=False) for pair in products]
    waveforms = [wave.waveforms for wave in waves]
    length = max(wave.cycles for wave in waveforms)
    before = waveforms[0].reset_cycles
    inputs = {
        name: np.stack([np.pad(wave.inputs[name], (before, length - wave.cycles)) for wave in waveforms], 1)
        for name in waveforms[0].inputs
    }
    inputs["rst"] = np.repeat([1, 0], [before, length])[:, None].repeat(len(waves), 1)
    simulation = simulate(netlist, inputs)
    for stream, wave in enumerate(waveforms):
        for name, expected in wave.expected.items():
            bits = wave.widths[name]
            seen = simulation.outputs[name][before : before + wave.cycles, stream]
            care = wave.care.get(name, np.ones(wave.cycles, bool))
            wrong = care & ((seen ^ expected.astype(np.uint64)) & np.uint64((1 << bits) - 1)).astype(bool)
            if wrong.any():
                raise BitwrightError(
                    f"The netlist of {engine.nest.name} ({engine.dataflow}) shows a wrong {name} in cycle "
                    f"{int(np.flatnonzero(wrong)[0])}: synthesis or simulation is at fault; do not trust its figures."
                )
    timing = analyse_timing(netlist)
    boxes = {box.name: box.module for box in report.glue.netlist(library).boxes}
    cycles = sum(wave.cycles for wave in waveforms)  # without reset, and what short streams wait for the longest
    energy = energy_by_part(netlist, simulation.toggles, cycles, boxes, timing)
    counts = part_counts(engine)
    per_part = {name: energy.get(name, 0.0) / count for name, count in counts.items()} | {"": energy.get("", 0.0)}
    macs = sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b in products)
    return _Measured(per_part, macs / cycles)


def skew_registers(engine: TensorEngine) -> int:
    """Register bits around the parts: operand skew, shared encoders' registers, control."""
    powers, coefficients = skew_polynomial(engine)
    terms = zip(powers, coefficients, strict=True)
    return round(sum(factor * float(engine.rows**i * engine.columns**j) for (i, j), factor in terms))


def skew_polynomial(engine: TensorEngine) -> tuple[Powers, tuple[float, ...]]:
    """The register bits around the parts as a polynomial: powers of (rows, columns) and their coefficients.

    It is of second degree (but for a bit or two of control), known from six small engines.
    """
    if engine.dataflow in ("ws", "tree"):
        sizes = [(1, 3), (1, 4), (1, 5)]
        powers: Powers = ((0, 0), (0, 1), (0, 2))
    else:
        sizes = [(3, 3), (4, 3), (3, 4), (4, 4), (5, 3), (3, 5)]
        powers = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2))
    counts = [_register_bits(engine.resized(rows, columns)) for rows, columns in sizes]
    matrix = [[rows**i * columns**j for i, j in powers] for rows, columns in sizes]
    solution = np.linalg.solve(np.array(matrix, float), np.array(counts, float))
    return powers, tuple(float(value) for value in solution)


@memory
def _register_bits(engine: TensorEngine) -> int:
    """Register bits of the top module without its parts."""
    text = rtlil_text(top(engine, instances=True), resettable=True)
    cells = re.findall(r"^\s*cell \$s?dff \S+\n((?:^\s*(?:parameter|connect).*\n)+)", text, re.M)
    return sum(int(found[1]) for cell in cells if (found := re.search(r"\\WIDTH (\d+)", cell)))
