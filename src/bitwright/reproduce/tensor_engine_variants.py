"""Which engines are compared, by architecture: honest baselines and transformed engines, and the best of each.

Baselines include the product left to the tool, two-stage multipliers, cut behind the product or at its carry-save pair,
and unsigned partial products (our addition), so that a gain of a transformed engine is not that of a trick both could
use. The digit-serial engines with shared encoders stand against every architecture, as the paper's do against its
bit-slice peers.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.engine.engine_gates import EngineGates, engine_gates
from bitwright.engine.libraries import find_library
from bitwright.engine.tensor_engine import TensorEngine

TOOL = "tool"  # in front of a baseline's transformations: the product is left to the synthesis tool
_PIPELINED = ("pipeline p",)
_CUT_AT_PAIR = ("sign_free", "pipeline p_s", "retime_add p")
_FRUGAL = ("carry_in_negation", "sign_free")
_PAIR_IN = ("reduce_apart acc_s", "pipeline acc_s_in")


@dataclass(frozen=True)
class Architecture:
    """One of the paper's architectures: its shape, and the transformations of its baselines and of its engines.

    Published gains stand in the abstract; `noted_...` are those of the array table as a public reading note gives it.
    """

    name: str
    dataflow: str
    rows: int
    columns: int
    depth: int
    baselines: tuple[tuple[str, ...], ...]
    transformed: tuple[tuple[str, ...], ...]
    published_area: float
    published_energy: float
    noted_area: float
    noted_energy: float

    def engine(self, transformations: tuple[str, ...]) -> TensorEngine:
        """The architecture with these transformations (those of a baseline may begin with `TOOL`)."""
        multiplier = "booth"
        if transformations[:1] == (TOOL,):
            transformations, multiplier = transformations[1:], "tool"
        return TensorEngine(
            self.rows, self.columns, transformations, self.dataflow, self.depth, multiplier=multiplier
        )  # fmt: skip


SERIAL = (
    ("opt3",), ("opt4c",), ("opt4e",), ("opt4e", *_FRUGAL), ("opt4c", "lanes 6", *_FRUGAL),
    ("opt4c", "lanes 8", *_FRUGAL), ("opt4c", "lanes 16", *_FRUGAL), ("opt4e", *_FRUGAL, "pipeline m"),
    ("opt4e", *_FRUGAL, *_PAIR_IN), ("opt4c", "lanes 6", *_FRUGAL, "pipeline m"),
    ("opt4c", "lanes 6", *_FRUGAL, "reduce_apart acc_s", "pipeline m acc_s_in"),
)  # fmt: skip
_BASELINES = ((TOOL,), (TOOL, *_PIPELINED), (), _PIPELINED, ("sign_free",), ("sign_free", *_PIPELINED), _CUT_AT_PAIR)
_PARALLEL = (
    ("opt1",), ("opt1", "sign_free"), ("opt1", "sign_free", "pipeline pp"), ("opt2", "hoist_encode"),
    ("opt2", "hoist_encode", "sign_free"), ("opt1", "sign_free", *_PAIR_IN),
    ("opt2", "hoist_encode", "sign_free", "pipeline m"),
)  # fmt: skip
ARCHITECTURES = (
    Architecture("systolic array", "os", 16, 16, 1, _BASELINES, _PARALLEL, 1.27, 1.04, 1.27, 1.04),
    Architecture(
        "3D-cube", "cube", 8, 8, 8, _BASELINES,
        (("opt1",), ("opt1", "sign_free", "pipeline t"), ("opt2", "hoist_encode", "sign_free", "pipeline t")),
        1.28, 1.56, 1.28, 1.56,
    ),
    Architecture(
        "multiplier-adder tree", "tree", 1, 16, 16,
        (*_BASELINES, ("pipeline p t",), (*_CUT_AT_PAIR, "pipeline t_s t")),
        (("opt1",), ("opt1", "sign_free", "pipeline t_s t"), (*_CUT_AT_PAIR, "pipeline t_s t", "retime_add acc")),
        1.56, 1.49, 1.58, 1.49,
    ),
    Architecture("2D-matrix", "matrix2d", 16, 16, 1, _BASELINES, _PARALLEL, 1.44, 1.20, 1.34, 1.11),
)  # fmt: skip

# EN-T alone: architectures of the same number of elements at each scale, (rows, columns, depth) by dataflow.
ENCODED_SCALES: dict[str, dict[str, tuple[int, int, int]]] = {
    scale: {
        "os": (side, side, 1), "ws": (1, side * side // 16, 16), "cube": (side // 2, side // 2, 4),
        "tree": (1, side * side // 16, 16), "matrix2d": (side, side, 1),
    }
    for scale, side in (("256 GOPS", 16), ("1 TOPS", 32), ("4 TOPS", 64))
}  # fmt: skip

# The arrays of the committed synthesis reports: dataflow, rows, columns, depth.
COMMITTED_SHAPES = {
    "output-stationary 16x16": ("os", 16, 16, 1),
    "weight-stationary 16x16": ("ws", 1, 16, 16),
    "3D-cube 8x8x8": ("cube", 8, 8, 8),
}


def as_published(names: str) -> bool:
    """Whether an engine takes the paper's steps only, without our unsigned partial products and pipeline cuts."""
    return not any(ours in names for ours in ("sign_free", "pipeline", "carry_in"))


def serial_engine(transformations: tuple[str, ...]) -> TensorEngine:
    """A digit-serial engine of 16 columns of 16 elements, EN-T digits."""
    return TensorEngine(16, 16, transformations, encoding="ent")


def measured(architecture: Architecture, library: str, kind: str) -> dict[str, EngineGates]:
    """Gates of the "baselines", the "transformed" or the "serial" engines of an architecture, by transformations."""
    cells = find_library(library)
    if kind == "serial":
        engines = {names: serial_engine(names) for names in SERIAL}
    else:
        engines = {names: architecture.engine(names) for names in getattr(architecture, kind)}
    return {", ".join(names) or "plain": engine_gates(engine, cells) for names, engine in engines.items()}


def best(found: dict[str, EngineGates], figure: str) -> tuple[str, EngineGates]:
    """The engine of highest "area_efficiency" or of lowest "energy_j_per_mac", with its transformations."""
    choose = max if figure == "area_efficiency" else min
    return choose(found.items(), key=lambda item: float(getattr(item[1], figure)))
