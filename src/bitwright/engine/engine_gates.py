"""What an engine costs in gates: area by part and by component, clock, and energy per multiply-accumulate.

Its parts (processing element, chain link, digit stream, output stage) are mapped once each and counted as often as the
engine has them; the registers that skew operands around them are mapped as what is left of the whole. Energy comes from
the joined netlist: gate-level activity of normally distributed operands in 16 streams. The clock is the static timing
of two rows and columns, because nothing here buffers the words that all rows or columns of a larger engine share.

`engine_gates` maps and simulates the engine as it is, up to 16 rows and columns. `part_gates` does so with a sample of
two rows and columns, from which `compose` estimates any size: an exploration sees many sizes of few engines.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as memory
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.arithmetic import encodings
from bitwright.core import cache
from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.quantity import Evidence
from bitwright.engine.evaluate import Integers
from bitwright.engine.format_products import OperandKind, normal_words, product_unit
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.liberty import Library
from bitwright.engine.mapping import serial_figures
from bitwright.engine.notation import print_nest
from bitwright.engine.power import energy_by_part
from bitwright.engine.rtl import TOP, generate, parts, top
from bitwright.engine.rtl.arithmetic import rtlil_text
from bitwright.engine.serial_cycles import array_cycles
from bitwright.engine.stimulus import stimulus
from bitwright.engine.synthesis import ArrayReport, Objective, synthesise_array
from bitwright.engine.tensor_engine import TensorEngine, cycles
from bitwright.engine.timing import analyse_timing
from bitwright.engine.widths import largest_depth
from bitwright.engine.yosys import yosys_version

_VERSION = 4
_STREAMS = 16
_SIMULATED = 16  # rows and columns of the largest engine that is mapped and simulated whole
_SMALL = 2
_SKEW_SAMPLE = 6
Powers = tuple[tuple[int, int], ...]
_SAMPLE_K = 768


@dataclass(frozen=True)
class EngineGates:
    """Gates of one engine in one library. Areas in um2 by part, energies per cycle (J) by part while it works.

    `period_s` is the static timing of an engine of two rows and columns: what one word drives in a larger one is taken
    as buffered. `macs_per_cycle` are useful multiply-accumulates of the whole engine per cycle on its products, fill
    and drain included; `energy_j_per_mac` is that of the same products.
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
        """Dynamic energy and leakage per useful multiply-accumulate."""
        return (self.energy_j_per_cycle + self.leakage_w * self.period_s) / self.macs_per_cycle

    @property
    def macs_per_second(self) -> float:
        """Useful multiply-accumulates per second."""
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


def small_engine(engine: TensorEngine, size: int = _SMALL) -> TensorEngine:
    """An engine of the same parts with at most `size` rows and columns."""
    return replace(engine, rows=min(engine.rows, size), columns=min(engine.columns, size))


def part_counts(engine: TensorEngine) -> dict[str, int]:
    """How often the engine has each of its modules."""
    positions = engine.rows * engine.columns
    lanes = engine.nest.extent("lane")
    counts = {
        "pe": positions, "chain_element": positions * engine.depth, "digit_stream": engine.rows * lanes,
        "output_stage": engine.rows if engine.serial else engine.columns,
    }  # fmt: skip
    return {name: counts[name] for name in part_names(engine)}


def product_cycles(engine: TensorEngine, products: Sequence[tuple[Integers, Integers]]) -> int:
    """Cycles of products (m, k), (k, n), one after the other: those of the hardware, counted by the cycle models.

    Raises InputError for operands the engine does not take.
    """
    if not engine.serial:
        return sum(int(cycles(engine, len(a), b.shape[1], len(b))) for a, b in products)
    figures, digits = serial_figures(engine), encodings.get(engine.encoding)
    return sum(
        array_cycles(
            a, b.shape[1], engine.rows, engine.columns, digits, engine.a_bits, figures.group, figures.lanes,
            pass_overhead=engine.columns,
        ).cycles + int(figures.start_cycles)
        for a, b in products
    )  # fmt: skip


def normal_products(engine: TensorEngine, streams: int = _STREAMS, seed: int = 0) -> list[tuple[Integers, Integers]]:
    """One product per stream of normal data: the largest of 2^20 samples would end the range (sigma = range / 4.9).

    K is 768 or more, less where narrow states hold no such sum.
    """
    rng = np.random.default_rng(seed)
    m = engine.rows if engine.dataflow not in ("ws", "tree") else 16
    k = max(_SAMPLE_K, 8 * engine.step) if engine.dataflow != "ws" else engine.depth
    k = max(1, largest_depth(engine.nest, k))

    def draw(shape: tuple[int, int], bits: int, kind: OperandKind | None) -> Integers:
        if kind:
            return normal_words(kind, rng, shape)
        top_value = (1 << (bits - 1)) - 1
        values = np.rint(rng.normal(0, top_value / 4.9, shape))
        return np.clip(values, -top_value - 1, top_value).astype(np.int64)

    unit = product_unit(engine.nest.product) if engine.nest.product else None
    a_kind, b_kind = (unit.a, unit.b) if unit else (None, None)
    return [
        (draw((m, k), engine.a_bits, a_kind), draw((k, engine.columns), engine.b_bits, b_kind)) for _ in range(streams)
    ]


@dataclass(frozen=True)
class PartGates:
    """What the parts of an engine cost, whatever its rows and columns: area (um2), leakage (W) and energy per cycle (J)
    of one of each, and of what stands around them ("skew") in the engine of `rows` x `columns` that was mapped and
    simulated. `skew_area_um2`: (constant, per register bit), from that engine and a larger one.
    """

    library: str
    rows: int
    columns: int
    area_um2: Mapping[str, float]
    leakage_w: Mapping[str, float]
    energy_j: Mapping[str, float]
    skew_area_um2: tuple[float, float]
    period_s: float
    recipe: str


def part_gates(engine: TensorEngine, library: Library, objective: Objective = "area_delay") -> PartGates:
    """Map and simulate the parts of an engine in one of two rows and columns, for `compose`; cached.

    Raises as `engine_gates`.
    """
    sample = small_engine(engine)

    def compute() -> dict[str, Any]:
        found = _part_gates(sample, library, objective, normal_products(sample))
        larger = engine.resized(_SKEW_SAMPLE if sample.rows > 1 else 1, _SKEW_SAMPLE)
        bits, more_bits = skew_registers(sample), skew_registers(larger)
        per_bit = (synthesise_engine(larger, library, objective).glue.area_um2 - found.area_um2["skew"]) / (
            more_bits - bits
        )
        return asdict(replace(found, skew_area_um2=(found.area_um2["skew"] - per_bit * bits, per_bit)))

    return _cached(sample, library, objective, normal_products(sample), compute)


def engine_gates(
    engine: TensorEngine, library: Library, objective: Objective = "area_delay",
    products: Sequence[tuple[Integers, Integers]] | None = None,
) -> EngineGates:  # fmt: skip
    """Area, clock and energy of an engine; expensive parts come from the cache.

    `products` drive the gates: operands (m, k), (k, n), one product per stream, all of one shape; the default is
    `normal_products`. Of an engine of more than 16 rows or columns one of 16 is simulated, its skew scaled by register
    bits; its rate is that of the cycle models on `normal_products` of its own size. Raises InputError for engines
    without hardware, unusable libraries and `products` for an engine that is not simulated whole, BitwrightError when
    the netlist disagrees with the exact evaluation.
    """
    sample = small_engine(engine, _SIMULATED)
    if products is not None and sample != engine:
        raise InputError(
            f"Engines of at most {_SIMULATED} rows and columns run on operands of yours, not {engine.rows} x "
            f"{engine.columns}: leave out the products, or take a smaller engine."
        )
    given = products or normal_products(sample)

    def compute() -> dict[str, Any]:
        return asdict(_part_gates(sample, library, objective, given))

    found = _cached(sample, library, objective, given, compute)
    run = given if sample == engine else normal_products(engine)
    macs = sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b in run)
    return compose(found, engine, macs / product_cycles(engine, run))


def compose(parts_of: PartGates, engine: TensorEngine, macs_per_cycle: float) -> EngineGates:
    """The engine made of these parts, of any number of rows and columns, at that useful rate.

    At another size than that of `parts_of` energies per cycle are estimates: the sample drains less and works more.
    """
    instances = part_counts(engine)
    constant, per_bit = parts_of.skew_area_um2
    area = constant + per_bit * skew_registers(engine)
    if (engine.rows, engine.columns) == (parts_of.rows, parts_of.columns):
        area = parts_of.area_um2["skew"]
    skew = area / parts_of.area_um2["skew"] if parts_of.area_um2["skew"] else 0.0
    leakage = skew * parts_of.leakage_w["skew"] + sum(
        count * parts_of.leakage_w[name] for name, count in instances.items()
    )
    return EngineGates(
        parts_of.library, instances, {name: parts_of.area_um2[name] for name in instances},
        {name: parts_of.energy_j[name] for name in instances}, area, skew * parts_of.energy_j["skew"],
        parts_of.period_s, leakage, macs_per_cycle, parts_of.recipe,
    )  # fmt: skip


def _cached(
    sample: TensorEngine, library: Library, objective: Objective, products: Sequence[tuple[Integers, Integers]],
    compute: Callable[[], dict[str, Any]],
) -> PartGates:  # fmt: skip
    """From the cache by the engine's description, its operands and our sources."""
    inputs = {
        "version": _VERSION, "sources": _sources(), "yosys": yosys_version(), "library": library.digest,
        "objective": objective, "engine": repr(sample), "nest": print_nest(sample.nest),
        "operands": [np.ascontiguousarray(matrix).tobytes() for pair in products for matrix in pair],
        "kind": compute.__qualname__,
    }  # fmt: skip
    return restored(cache.get_or_compute("engine-gates", inputs, compute))


def restored(data: Mapping[str, Any]) -> PartGates:
    """The gates that were stored as a dictionary."""
    return PartGates(**{**data, "skew_area_um2": tuple(data["skew_area_um2"])})


@memory
def _sources() -> str:
    """Digest of this module and of all modules of the package that it imports, directly or not: figures of another
    version of the hardware are not taken from the cache."""
    root = Path(__file__).parents[1]
    found: dict[Path, bytes] = {}
    waiting = [Path(__file__)]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found[path] = path.read_bytes()
        for node in ast.walk(ast.parse(found[path])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{root.name}."):
                place = root.joinpath(*(node.module or "").split(".")[1:])
                names = [place / f"{alias.name}.py" for alias in node.names]
                waiting += [place.with_suffix(".py"), place / "__init__.py", *names]
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(found[path])
    return digest.hexdigest()


def _part_gates(
    engine: TensorEngine, library: Library, objective: Objective, products: Sequence[tuple[Integers, Integers]]
) -> PartGates:
    """Of the engine as it is; its skew is known per register bit only."""
    library.check_energy()
    report = synthesise_engine(engine, library, objective)
    small = small_engine(engine)
    period_s = report.period_s if small == engine else synthesise_engine(small, library, objective).period_s
    bits = skew_registers(engine)
    return PartGates(
        library.name, engine.rows, engine.columns,
        {name: part.area_um2 for name, part in report.parts.items()} | {"skew": report.glue.area_um2},
        {name: part.leakage_w for name, part in report.parts.items()} | {"skew": report.glue.leakage_w},
        _measure(engine, report, library, products), (0.0, report.glue.area_um2 / max(1, bits)),
        period_s, report.parts[part_names(engine)[0]].recipe,
    )  # fmt: skip


def _measure(
    engine: TensorEngine, report: ArrayReport, library: Library, products: Sequence[tuple[Integers, Integers]]
) -> dict[str, float]:
    """Energy (J) per cycle of one of each part and of the skew, one product per stream; every output is compared."""
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
    taken = sum(wave.cycles for wave in waveforms)  # without reset, and what short streams wait for the longest
    counted = product_cycles(engine, products)
    if taken != counted:
        raise BitwrightError(
            f"{engine.nest.name} ({engine.dataflow}) took {taken} cycles, its cycle model counts {counted}."
        )
    energy = energy_by_part(netlist, simulation.toggles, taken, boxes, timing)
    per_part = {name: energy.get(name, 0.0) / count for name, count in part_counts(engine).items()}
    return per_part | {"skew": energy.get("", 0.0)}


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
