"""Exploration of engines: every combination of an exploration file's axes, evaluated on a workload, and the Pareto
front of area, energy per multiply-accumulate and throughput.

Points that differ only in rows and columns share their gates (`engine.engine_gates.part_gates`), which are evaluated
once each, in parallel processes or on a Ray cluster, and cached as they finish: an interrupted exploration loses none.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, field_validator

from bitwright.arithmetic import encodings
from bitwright.core.errors import BitwrightError, InputError, ToolError
from bitwright.core.processes import default_processes, each
from bitwright.core.progress import progress
from bitwright.core.yaml_text import parse_yaml
from bitwright.engine.digit_profiles import OperandProfile, normal_profile
from bitwright.engine.engine_gates import EngineGates, PartGates, compose, part_gates, restored, small_engine
from bitwright.engine.expected_cycles import expected_array_cycles
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.legality import check
from bitwright.engine.libraries import find_library
from bitwright.engine.mapping import serial_figures
from bitwright.engine.tensor_engine import TensorEngine, cycles
from bitwright.engine.transformations import SEQUENCES, TRANSFORMATIONS
from bitwright.engine.widths import check_depth

Size = Annotated[int, Strict(), Field(ge=1, le=1024)]
Extent = Annotated[int, Strict(), Field(ge=1, le=1 << 40)]
_ANSWER_S = 5.0  # how long a Ray cluster may take to accept a connection
_MOST_REASONS = 9  # listed besides the first when nothing can be built
OBJECTIVES = ("area_um2", "energy_j_per_mac", "macs_per_second")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(_Section):
    """Rows (M), columns (N) and depth (K) of an engine; ws and tree have one row, os and matrix2d a depth of 1."""

    rows: Size = 1
    columns: Size
    depth: Size = 1


class Widths(_Section):
    """Bits of both operands and of the accumulator."""

    a_bits: Annotated[int, Strict(), Field(ge=2, le=16)] = 8
    b_bits: Annotated[int, Strict(), Field(ge=2, le=16)] = 8
    accumulator_bits: Annotated[int, Strict(), Field(ge=4, le=64)] = 32


class Product(_Section):
    """C (m, n) = A (m, k) @ B (k, n), `count` times."""

    m: Extent
    k: Extent
    n: Extent
    count: Extent = 1


class Exploration(_Section):
    """An exploration file: its axes (every combination is a point) and the matrix products that are evaluated."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    dataflow: tuple[Literal["os", "ws", "cube", "tree", "matrix2d"], ...] = Field(("os",), min_length=1)
    shapes: tuple[Shape, ...] = Field(min_length=1)
    transformations: tuple[tuple[str, ...], ...] = Field(((),), min_length=1)
    encoding: tuple[str, ...] = Field(("mbe",), min_length=1)
    widths: tuple[Widths, ...] = Field((Widths(),), min_length=1)
    library: tuple[str, ...] = Field(("predictive-28nm",), min_length=1)
    products: tuple[Product, ...] = Field((Product(m=1024, k=768, n=768),), min_length=1)
    objective: Literal["area_delay", "area", "delay"] = "area_delay"

    @field_validator("transformations", mode="before")
    @classmethod
    def _sequences(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(item, str) for item in value):
            raise ValueError("expected a list of sequences, each a list, such as [[], [opt1], [opt1, sign_free]]")
        return value


@dataclass(frozen=True)
class Point:
    """One engine in one library. Its `gates` are composed of those of a small engine, at the rate of the products.

    `on_front`: no other point of its library is better in one objective and as good in the others.
    """

    engine: TensorEngine
    library: str
    gates: EngineGates
    cycles: float
    macs: int
    on_front: bool = False

    @property
    def area_um2(self) -> float:
        """Cell area."""
        return self.gates.area_um2

    @property
    def macs_per_second(self) -> float:
        """Multiply-accumulates of the products per second."""
        return self.gates.macs_per_second

    @property
    def energy_j_per_mac(self) -> float:
        """Switching and leakage over all cycles, per multiply-accumulate."""
        return self.gates.energy_j_per_mac

    @property
    def name(self) -> str:
        """Dataflow, shape, transformations, encoding and widths in one line."""
        engine = self.engine
        size = f"{engine.rows}x{engine.columns}" + (f"x{engine.depth}" if engine.depth > 1 else "")
        changes = ", ".join(engine.transformations) or "baseline"
        return f"{engine.dataflow} {size}, {changes}, {engine.encoding}, {_widths(engine)}"


def _widths(engine: TensorEngine) -> str:
    sums = "" if engine.accumulator_bits == 32 else f" into {engine.accumulator_bits}"
    return f"int{engine.a_bits}x{engine.b_bits}{sums}"


@dataclass(frozen=True)
class ExplorationResult:
    """All points, and what could not be built with the reason."""

    name: str
    points: tuple[Point, ...]
    refused: Mapping[str, str]

    @property
    def front(self) -> tuple[Point, ...]:
        """The points on the Pareto front, smallest area first."""
        return tuple(sorted((point for point in self.points if point.on_front), key=lambda point: point.area_um2))


def load_exploration(path: Path) -> Exploration:
    """Read and check an exploration file. Raises InputError naming the key, or the unknown transformation."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the exploration {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no keys; an exploration has at least `name` and `shapes`.")
    try:
        exploration = Exploration(**data)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}, {'.'.join(map(str, first['loc']))}: {message}") from error
    for sequence in exploration.transformations:
        for line in sequence:
            name = (line.split() or [""])[0]
            if name not in (*TRANSFORMATIONS, *SEQUENCES):
                known = ", ".join((*SEQUENCES, *TRANSFORMATIONS))
                raise InputError(f"{path}, transformations: {line!r} is none of {known}.")
    for encoding in exploration.encoding:
        encodings.get(encoding)
    for library in exploration.library:
        _ = find_library(_place(library, path.parent)).mappable
    return exploration


def _place(library: str, folder: Path) -> str:
    inside = folder / library
    return str(inside.absolute()) if inside.is_file() else library


def explore(
    exploration: Exploration, folder: Path = Path(), ray: str | None = None, processes: int | None = None
) -> ExplorationResult:
    """Evaluate every point. `ray`: address of a running Ray cluster ("auto" for a local one) instead of processes.

    What the notation or the hardware refuses is listed with its reason. Raises InputError when nothing can be built (an
    illegal sequence shows the nest before the failing step), ToolError when Ray is asked for and not there,
    BitwrightError when the work is interrupted: finished points stay in the cache.
    """
    engines, refused = _engines(exploration)
    if not engines:
        raise _nothing_built(exploration, refused)
    groups: dict[tuple[TensorEngine, str], None] = {}
    for library in exploration.library:
        for engine in engines:
            groups[small_engine(engine), _place(library, folder)] = None
    gates = _evaluate(list(groups), exploration.objective, ray, processes)
    points = []
    for library in exploration.library:
        for engine in engines:
            found = gates[small_engine(engine), _place(library, folder)]
            if isinstance(found, str):
                refused[f"{library}: {_describe(engine)}"] = found
                continue
            taken = sum(product.count * _cycles(engine, product) for product in exploration.products)
            macs = sum(product.count * product.m * product.k * product.n for product in exploration.products)
            points.append(Point(engine, library, compose(found, engine, macs / taken), taken, macs))
    if not points:
        raise _nothing_built(exploration, refused)
    return ExplorationResult(exploration.name, tuple(_with_front(points)), refused)


def _nothing_built(exploration: Exploration, refused: Mapping[str, str]) -> InputError:
    """The first reason in full, with the nest it shows, and the others by their first line."""
    first, *others = refused.items()
    lines = [f"{label}: {reason.splitlines()[0]}" for label, reason in others[:_MOST_REASONS]]
    if len(others) > _MOST_REASONS:
        lines.append(f"and {len(others) - _MOST_REASONS} more.")
    return InputError("\n".join([f"No point of {exploration.name!r} can be built:", *lines, f"{first[0]}: {first[1]}"]))


def _describe(engine: TensorEngine) -> str:
    changes = ", ".join(engine.transformations) or "baseline"
    return f"{engine.dataflow} {changes}, {engine.encoding}, {_widths(engine)}"


def _engines(exploration: Exploration) -> tuple[list[TensorEngine], dict[str, str]]:
    """Every engine that the notation and the hardware accept and whose states hold the products; why not the others."""
    made: dict[TensorEngine, TensorEngine] = {}  # an axis may name a value twice
    refused: dict[str, str] = {}
    deepest = max(product.k for product in exploration.products)
    forms: dict[TensorEngine, TensorEngine] = {}
    axes = itertools.product(
        exploration.dataflow, exploration.shapes, exploration.transformations, exploration.encoding, exploration.widths
    )
    for dataflow, shape, sequence, encoding, widths in axes:
        label = (
            f"{dataflow} {shape.rows}x{shape.columns}x{shape.depth}, {', '.join(sequence) or 'baseline'}, {encoding}, "
            f"int{widths.a_bits}x{widths.b_bits} into {widths.accumulator_bits}"
        )
        try:
            engine = small_engine(
                TensorEngine(
                    shape.rows, shape.columns, sequence, dataflow, shape.depth, widths.a_bits, widths.b_bits,
                    widths.accumulator_bits, encoding,
                )
            )  # fmt: skip
            if engine not in forms:
                check_hardware(engine)
                check_depth(engine.nest, deepest)
                check(engine.nest, deepest)
                forms[engine] = engine
            whole = forms[engine].resized(shape.rows, shape.columns)
            made.setdefault(whole, whole)
        except InputError as error:
            refused[label] = str(error)
    return list(made), refused


def _cycles(engine: TensorEngine, product: Product) -> float:
    """Cycles of one product; for serial engines expected on normal data, the operand A encoded."""
    if not engine.serial:
        return float(cycles(engine, product.m, product.n, product.k))
    figures = serial_figures(engine)
    return _serial_cycles(
        engine.encoding, engine.a_bits, figures.group, engine.rows, engine.columns, figures.lanes, product
    ) + figures.start_cycles  # fmt: skip


@cache
def _serial_cycles(
    encoding: str, bits: int, group: int, columns: int, elements: int, lanes: int, product: Product
) -> float:
    expected = expected_array_cycles(
        _profile(encoding, bits, group), product.m, product.n, product.k, columns, elements, lanes,
        pass_overhead=elements,
    )  # fmt: skip
    return float(expected.cycles)


@cache
def _profile(encoding: str, bits: int, group: int) -> OperandProfile:
    return normal_profile(encoding=encoding, bits=bits, group=group)


def _gates_of(engine: TensorEngine, library: str, objective: str) -> dict[str, Any] | str:
    """Gates of one small engine, or why there are none; runs in a worker."""
    try:
        return asdict(part_gates(engine, find_library(library), objective))  # type: ignore[arg-type]
    except InputError as error:
        return str(error)
    except (ToolError, OSError):  # the same for every engine
        raise
    except Exception as error:  # a fault of ours; the other points are worth having
        return f"fault of Bitwright, please report it: {type(error).__name__}: {error}"


def _evaluate(
    groups: Sequence[tuple[TensorEngine, str]], objective: str, ray: str | None, processes: int | None
) -> dict[tuple[TensorEngine, str], PartGates | str]:
    found: dict[tuple[TensorEngine, str], PartGates | str] = {}
    jobs = [(engine, library, objective) for engine, library in groups]
    results = _on_ray(ray)(jobs) if ray else each(_gates_of, jobs, processes or default_processes(len(jobs)))
    try:
        with progress("Synthesising and simulating distinct engines", len(jobs)) as advance:
            for index, result in results:
                found[groups[index]] = result if isinstance(result, str) else restored(result)
                advance(1)
    except KeyboardInterrupt:
        raise BitwrightError(
            f"Interrupted after {len(found)} of {len(jobs)} distinct engines; run it again to go on with the rest."
        ) from None
    return found


Runner = Callable[[list[tuple[TensorEngine, str, str]]], Iterator[tuple[int, Any]]]


def _on_ray(address: str) -> Runner:
    try:
        import ray  # type: ignore[import-not-found]
    except ImportError:
        raise ToolError(
            "Ray is not installed. Install it (`pip install 'bitwright[ray]'`), or explore in local processes."
        ) from None

    def run(jobs: list[tuple[TensorEngine, str, str]]) -> Iterator[tuple[int, Any]]:
        _check_answers(address)
        # Workers have the environment of their cluster, but use the cache of this process.
        cache = {name: os.path.abspath(os.environ[name]) for name in ("BITWRIGHT_CACHE",) if os.environ.get(name)}
        connected = ray.is_initialized()
        try:
            ray.init(
                address=address, runtime_env={"env_vars": cache}, ignore_reinit_error=True, log_to_driver=False,
                logging_level="WARNING",
            )  # fmt: skip
            remote = ray.remote(_gates_of)
            waiting = {remote.remote(*job): index for index, job in enumerate(jobs)}
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done[0]), ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise ToolError(f"The Ray cluster {address!r} failed: {error}") from None
        finally:
            if not connected:
                ray.shutdown()

    return run


def _check_answers(address: str) -> None:
    """Look for a cluster before Ray does, which would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"{address!r} is no address of a Ray cluster: expected auto, HOST:PORT or ray://HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
    except OSError as error:
        raise ToolError(
            f"No Ray cluster answers at {address}: {error}. Start one with `ray start --head`, or explore in local "
            "processes."
        ) from None


def pareto(figures: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows of `figures` (points, objectives), all to be minimised, no other row dominates. Equal rows stay."""
    no_worse = np.all(figures[None, :, :] <= figures[:, None, :], axis=2)
    better = np.any(figures[None, :, :] < figures[:, None, :], axis=2)
    return np.asarray(~np.any(no_worse & better, axis=1))


def _with_front(points: Sequence[Point]) -> Iterator[Point]:
    """The points, those on the front of their library and operand widths marked."""
    keys = [(point.library, point.engine.a_bits, point.engine.b_bits) for point in points]
    marked = np.zeros(len(points), bool)
    for key in dict.fromkeys(keys):
        rows = [index for index, other in enumerate(keys) if other == key]
        figures = np.array([
            [points[index].area_um2, points[index].energy_j_per_mac, -points[index].macs_per_second] for index in rows
        ])  # fmt: skip
        marked[rows] = pareto(figures)
    for point, flag in zip(points, marked, strict=True):
        yield Point(point.engine, point.library, point.gates, point.cycles, point.macs, bool(flag))
