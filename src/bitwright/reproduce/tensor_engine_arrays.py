"""Claims of system 01 about whole arrays in gates: four architectures, the committed reports' arrays, EN-T encoders."""

from __future__ import annotations

from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.engine_gates import EngineGates, engine_gates
from bitwright.engine.libraries import find_library
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.tensor_engine_reports import RATIOS, committed_ratios
from bitwright.reproduce.tensor_engine_variants import (
    ARCHITECTURES,
    COMMITTED_SHAPES,
    ENCODED_SCALES,
    Architecture,
    as_published,
    best,
    measured,
)

ARRAY_LIBRARIES = ("predictive-28nm", "osu018")
_PAPER = "arXiv 2503.06342"
_FLOW = (
    "published: SMIC 28 nm, commercial tools, after placement; ours: the named library, Yosys and ABC, before "
    "placement, zero-delay activity of normal INT8 operands at K = 768"
)
_LIMITS = (
    "what limits ours: compressed accumulation clocks two state words per element and drains both; serial columns "
    "drain after every bit weight; a tree keeps one state for 16 products, a serial element one for four at most"
)
# Which engines stand against which baselines: label, kinds of engines, only the paper's own steps, over which baseline.
_COMPARISONS = (
    ("OPT1, OPT2 of the paper", ("transformed",), True, "plain", "the single-cycle Booth baseline"),
    ("OPT1, OPT2 and our steps", ("transformed",), False, None, "the best of all baselines"),
    ("serial columns too", ("transformed", "serial"), False, None, "the best of all baselines"),
)


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def _evidence(figure: str) -> Evidence:
    return Evidence.SIMULATED if figure == "energy_j_per_mac" else Evidence.SYNTHESISED


def array_ratio(
    architecture: Architecture, library: str, figure: str, kinds: tuple[str, ...], paper_only: bool = False,
    over: str | None = None,
) -> Quantity:  # fmt: skip
    """Best engine of these kinds over a baseline (None: the best) in "area_efficiency" or "energy_j_per_mac"."""
    baselines = measured(architecture, library, "baselines")
    base_name, base = (over, baselines[over]) if over else best(baselines, figure)
    found = {names: gates for kind in kinds for names, gates in measured(architecture, library, kind).items()}
    name, ours = best({names: gates for names, gates in found.items() if not paper_only or as_published(names)}, figure)

    def gain(gates: EngineGates) -> float:
        ratio = float(getattr(gates, figure)) / float(getattr(base, figure))
        return ratio if figure == "area_efficiency" else 1 / ratio

    others = ", ".join(f"{each} x{gain(gates):.2f}" for each, gates in baselines.items())
    return Quantity(gain(ours), "x", _evidence(figure), f"{name} over {base_name}; every baseline over it: {others}")


def array_claims() -> list[Claim]:
    """Area and energy efficiency of the four architectures per library: as published, and over the best baseline."""
    found = []
    for architecture in ARCHITECTURES:
        for library in ARRAY_LIBRARIES:
            for what, figure, printed, noted in (
                ("area efficiency", "area_efficiency", architecture.published_area, architecture.noted_area),
                ("energy efficiency", "energy_j_per_mac", architecture.published_energy, architecture.noted_energy),
            ):
                for label, kinds, paper_only, over, baseline in _COMPARISONS:

                    def ours(
                        architecture: Architecture = architecture, library: str = library, figure: str = figure,
                        kinds: tuple[str, ...] = kinds, paper_only: bool = paper_only, over: str | None = over,
                    ) -> Quantity:  # fmt: skip
                        return array_ratio(architecture, library, figure, kinds, paper_only, over)

                    conditions = f"{architecture.name}, {label}, over {baseline}, {library}"
                    abstract = _published(printed, "x", f"{_PAPER}, abstract")
                    found.append(Claim(what, conditions, abstract, ours, None, f"{_FLOW}; {_LIMITS}"))
                    if noted != printed:
                        table = _published(noted, "x", f"{_PAPER}, array table as a public reading note gives it")
                        conditions += "; array table, which deviates from the abstract"
                        found.append(Claim(what, conditions, table, ours, None, f"{_FLOW}; {_LIMITS}"))
    return found


def committed_array_claims() -> list[Claim]:
    """OPT1 over MAC in the arrays of the committed reports, beside the same arrays of ours, per library."""
    note = (
        "published: reports of the official repository, SAED 32 nm, retimed, vectorless power; ours: single-cycle "
        f"Booth elements on both sides, not retimed, energy of simulated activity; {_LIMITS}"
    )
    found = []
    for design, (dataflow, rows, columns, depth) in COMMITTED_SHAPES.items():
        for what, committed in zip(RATIOS, committed_ratios(design), strict=True):
            for library in ARRAY_LIBRARIES:

                def ours(
                    what: str = what, library: str = library, dataflow: str = dataflow, rows: int = rows,
                    columns: int = columns, depth: int = depth,
                ) -> Quantity:  # fmt: skip
                    plain, compressed = (
                        engine_gates(TensorEngine(rows, columns, names, dataflow, depth), find_library(library))
                        for names in ((), ("opt1",))
                    )
                    frequency, area = plain.period_s / compressed.period_s, compressed.area_um2 / plain.area_um2
                    energy = compressed.energy_j_per_cycle / plain.energy_j_per_cycle
                    values = dict(zip(RATIOS, (frequency, area, frequency / area, energy), strict=True))
                    evidence = Evidence.SIMULATED if what == RATIOS[-1] else Evidence.SYNTHESISED
                    return Quantity(values[what], "x", evidence)

                published = _published(committed, "x", "synthesis reports of the official repository, SAED 32 nm")
                found.append(Claim(f"OPT1 / MAC array, {what}", f"{design}, {library}", published, ours, None, note))
    return found


def encoder_claims() -> list[Claim]:
    """EN-T encoders shared at the array edge, against Booth encoders in every element; mean of five array types."""
    found = []
    note = (
        "published: mean over five array types in a commercial flow; ours: the same mean, Booth and single-cycle on "
        "both sides; 256, 1,024 and 4,096 elements (0.5 GHz assumed); digit codes travel in registers of their own"
    )
    for what, figure, values in (
        ("EN-T alone, area efficiency", "area_efficiency", (8.7, 12.2, 11.0)),
        ("EN-T alone, energy efficiency", "energy_j_per_mac", (13.0, 17.5, 15.5)),
    ):
        for scale, value in zip(ENCODED_SCALES, values, strict=True):
            for library in ARRAY_LIBRARIES:

                def ours(figure: str = figure, scale: str = scale, library: str = library) -> Quantity:
                    cells = find_library(library)
                    gains = {}
                    for dataflow, (rows, columns, depth) in ENCODED_SCALES[scale].items():
                        plain, shared = (
                            engine_gates(
                                TensorEngine(rows, columns, names, dataflow, depth, encoding=encoding), cells
                            )
                            for names, encoding in (((), "mbe"), (("hoist_encode",), "ent"))
                        )  # fmt: skip
                        ratio = float(getattr(shared, figure)) / float(getattr(plain, figure))
                        gains[dataflow] = 100 * (ratio - 1 if figure == "area_efficiency" else 1 / ratio - 1)
                    text = ", ".join(f"{dataflow} {gain:+.1f} %" for dataflow, gain in gains.items())
                    return Quantity(sum(gains.values()) / len(gains), "%", _evidence(figure), text)

                published = _published(value, "%", "arXiv 2404.11887, abstract")
                conditions = f"{scale}, mean of five array types, {library}"
                found.append(Claim(what, conditions, published, ours, None, note))
    return found
