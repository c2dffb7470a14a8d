"""Processing elements of system 01 in gates: a reference table of mappings beside ours, and ratios to both baselines.

The reference is not of the paper: independently written and simulated Verilog, mapped to OSU018 with open tools (Yosys
0.23, ABC, OpenSTA 2.0.17), nothing placed. It states ranges for the ratios that such tools can reach; we are checked
against them under the same library and reported under the others. As in the reference, no neighbour drains through the
elements of this table: their states are cleared instead (arrays of this package are compared with all they need in
`tensor_engine_arrays`). Every ratio needs all of the baselines: the product left to the tool, Booth rows in one cycle,
and Booth rows in two stages. What cannot be mapped leaves no ratio at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.engine_gates import engine_gates
from bitwright.engine.libraries import find_library
from bitwright.engine.power import vectorless_power
from bitwright.engine.rtl import PE, generate_part
from bitwright.engine.synthesis import GateReport, synthesise
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.reproduce.claims import Claim

LIBRARIES = ("osu018", "predictive-28nm", "predictive-45nm", "predictive-180nm")
REFERENCE_LIBRARY = "osu018"
_REFERENCE = "reference mappings with open tools, OSU018, independent of this package and not of the paper"
_SERIAL = 2.40  # issue cycles per operand that the reference charges a serial element
_FOUR_LANES = 2.24 / 4  # the same for a group of four with ideal lanes
_SCRIPTS = ("none", "a", "b", "c", "d", "area")


@dataclass(frozen=True)
class Element:
    """One processing element: how ours is derived, what it takes per multiply-accumulate, and the reference mappings.

    `reference`: (thousand um2, ns) by script in the order none, a, b, c, d, area. `transformations` is None where we
    have no counterpart.
    """

    transformations: tuple[str, ...] | None
    cycles_per_mac: float = 1.0
    multiplier: str = "booth"
    encoding: str = "mbe"
    reference: tuple[tuple[float, float], ...] = ()

    @property
    def reference_area_period(self) -> float:
        """Best of the scripted mappings, thousand um2 ns per multiply-accumulate."""
        return min(area * period for area, period in self.reference[1:]) * self.cycles_per_mac


ELEMENTS: dict[str, Element] = {
    "MAC, merged by the tool": Element(
        (), multiplier="tool",
        reference=((38.2, 7.39), (49.7, 3.82), (45.3, 3.75), (40.5, 3.87), (46.9, 4.79), (41.1, 7.10)),
    ),
    "MAC, tool's multiplier kept apart": Element(
        None, reference=((26.5, 6.42), (33.4, 4.41), (30.7, 4.22), (27.2, 4.58), (30.5, 5.27), (26.5, 6.09)),
    ),
    "MAC, Booth": Element(()),
    "MAC, Booth, one adder": Element(
        ("retime_add p",),
        reference=((27.6, 6.63), (31.8, 4.23), (31.3, 3.77), (30.5, 4.23), (35.5, 4.81), (26.0, 6.95)),
    ),
    "OPT1": Element(
        ("opt1",), reference=((29.6, 4.82), (32.1, 2.45), (32.5, 2.49), (30.0, 2.79), (34.5, 2.38), (29.3, 2.82)),
    ),
    "OPT2": Element(("opt2",)),
    "OPT2, shared encoders": Element(
        ("opt2", "hoist_encode"),
        reference=((29.8, 3.63), (34.4, 2.27), (34.0, 2.48), (31.1, 2.24), (35.9, 2.30), (29.8, 2.86)),
    ),
    "OPT3": Element(
        ("opt3",), _SERIAL, encoding="ent",
        reference=((25.7, 3.34), (28.5, 2.26), (27.2, 2.25), (26.1, 2.38), (26.5, 2.03), (25.6, 2.79)),
    ),
    "OPT4C": Element(
        ("opt4c",), _SERIAL, encoding="ent",
        reference=((13.4, 3.69), (15.0, 1.69), (14.6, 1.67), (14.4, 1.91), (14.2, 1.54), (13.8, 2.09)),
    ),
    "OPT4E": Element(
        ("opt4e",), _FOUR_LANES, encoding="ent",
        reference=((31.4, 4.11), (37.7, 2.47), (36.5, 2.30), (34.1, 2.35), (35.6, 2.12), (31.1, 2.88)),
    ),
    "MAC, Booth, sign-free": Element(("sign_free",)),
    "MAC, Booth, one adder, sign-free": Element(
        ("sign_free", "retime_add p"),
        reference=((21.9, 5.24), (23.8, 3.53), (23.7, 3.55), (21.5, 3.91), (26.9, 4.44), (19.2, 6.55)),
    ),
    "MAC, two stages": Element(("pipeline p",)),
    "MAC, two stages, sign-free": Element(("sign_free", "pipeline p")),
    "MAC, two stages, cut at the carry-save pair": Element(("pipeline p_s", "retime_add p")),
    "MAC, two stages, cut at the carry-save pair, sign-free": Element(
        ("sign_free", "pipeline p_s", "retime_add p"),
        reference=((22.0, 3.77), (24.5, 2.12), (24.3, 2.23), (24.0, 2.29), (28.1, 4.06), (21.3, 4.73)),
    ),
    "OPT1, sign-free": Element(
        ("opt1", "sign_free"),
        reference=((24.4, 2.73), (26.7, 2.24), (26.8, 2.26), (24.2, 2.36), (28.8, 2.15), (24.0, 2.80)),
    ),
    "OPT1, two stages, sign-free": Element(
        ("opt1", "sign_free", "pipeline pp"),
        reference=((25.3, 2.27), (26.7, 2.03), (26.4, 1.86), (25.6, 2.28), (29.5, 1.78), (25.1, 2.45)),
    ),
    "OPT2, sign-free": Element(("opt2", "sign_free")),
    "OPT2, shared encoders, sign-free": Element(("opt2", "hoist_encode", "sign_free")),
    "OPT2, shared encoders, two stages, sign-free": Element(("opt2", "hoist_encode", "sign_free", "pipeline m")),
    "OPT3, sign-free": Element(("opt3", "sign_free"), _SERIAL, encoding="ent"),
    "OPT4C, sign-free": Element(
        ("opt4c", "sign_free"), _SERIAL, encoding="ent",
        reference=((11.6, 1.63), (12.6, 1.46), (12.6, 1.44), (12.3, 1.52), (13.0, 1.41), (11.8, 1.94)),
    ),
    "OPT4E, sign-free": Element(
        ("opt4e", "sign_free"), _FOUR_LANES, encoding="ent",
        reference=((27.1, 2.31), (32.6, 2.26), (31.9, 2.14), (27.4, 2.18), (30.4, 2.11), (26.7, 2.70)),
    ),
    "OPT4C, two stages, sign-free": Element(("opt4c", "sign_free", "pipeline m"), _SERIAL, encoding="ent"),
    "OPT4E, two stages, sign-free": Element(("opt4e", "sign_free", "pipeline m"), _FOUR_LANES, encoding="ent"),
}  # fmt: skip
TOOL = ("MAC, merged by the tool",)
SAME_ROWS = ("MAC, Booth, one adder", "MAC, Booth, one adder, sign-free")
SINGLE_CYCLE = ("MAC, Booth", "MAC, Booth, sign-free", *SAME_ROWS)
PIPELINED = (
    "MAC, two stages", "MAC, two stages, sign-free", "MAC, two stages, cut at the carry-save pair",
    "MAC, two stages, cut at the carry-save pair, sign-free",
)  # fmt: skip
# Each engine's elements: with sign extension, sign-free, and what else may stand against a pipelined MAC.
VARIANTS: dict[str, tuple[str, ...]] = {
    "OPT1": ("OPT1", "OPT1, sign-free", "OPT1, two stages, sign-free"),
    "OPT2": ("OPT2", "OPT2, sign-free"),
    "OPT2, shared encoders": (
        "OPT2, shared encoders", "OPT2, shared encoders, sign-free", "OPT2, shared encoders, two stages, sign-free",
    ),
    "OPT3": ("OPT3", "OPT3, sign-free"),
    "OPT4C": ("OPT4C", "OPT4C, sign-free", "OPT4C, two stages, sign-free"),
    "OPT4E": ("OPT4E", "OPT4E, sign-free", "OPT4E, two stages, sign-free"),
}  # fmt: skip
# Area efficiency over the single-cycle MAC with the same rows, and over the two-stage pipelined MAC. The reference
# states "about 1.1" for OPT2 and "below 1" for OPT3 over the pipelined MAC: 1.05 to 1.15, and 0 to 1.
RANGES = {
    "OPT1": ((1.4, 1.6), (1.05, 1.10)),
    "OPT2": ((1.6, 1.8), (1.05, 1.15)),
    "OPT2, shared encoders": ((1.6, 1.8), (1.05, 1.15)),
    "OPT3": ((0.9, 1.0), (0.0, 1.0)),
    "OPT4C": ((1.9, 2.4), (1.0, 1.2)),
    "OPT4E": ((2.4, 2.8), (1.2, 1.6)),
}
# What sets an engine's ratio apart from the reference's.
NOTES = {
    "OPT1": "the sign-free MAC with one adder gains more of the mapping than the sign-free OPT1 does",
    "OPT2": "ours holds four Booth encoders that pick the bit weight; the reference's area leaves no room for them",
    "OPT2, shared encoders": "encoders outside, not charged here; registers for four operand pairs",
    "OPT3": "ours registers the codes of a group and the select before the multiplexer, which shortens its path",
    "OPT4C": "encoder and sparse encoder outside, not charged here",
    "OPT4E": "encoders outside, not charged here",
}


@cache
def processing_element(name: str, library: str) -> GateReport:
    """One INT8 element of `ELEMENTS` with a 32-bit accumulator, mapped for the best area times delay.

    Raises BitwrightError where we have no counterpart, and as `synthesis.synthesise`.
    """
    element = ELEMENTS[name]
    if element.transformations is None:
        raise BitwrightError(f"{name}: no element of ours keeps the tool's multiplier apart from the accumulator.")
    engine = TensorEngine(
        16, 16, element.transformations, encoding=element.encoding, multiplier=element.multiplier
    )  # fmt: skip
    return synthesise(generate_part(engine, PE, drains=False), PE, find_library(library))


def area_period(name: str, library: str) -> float:
    """Cell area times period per multiply-accumulate, um2 s; shared encoders and adders are not of the element."""
    report = processing_element(name, library)
    return report.area_um2 * _period(report) * ELEMENTS[name].cycles_per_mac


def maximum_frequency(name: str, library: str) -> float:
    """Hz of the fastest mapping."""
    return 1 / fastest_period(processing_element(name, library))


def frequency(name: str, library: str) -> float:
    """Hz of the mapping of least area times delay."""
    return 1 / _period(processing_element(name, library))


def energy_per_cycle(name: str, library: str) -> float:
    """Vectorless energy per cycle (J), every net toggling in one cycle of ten."""
    report = processing_element(name, library)
    return vectorless_power(report.netlist(find_library(library)), _period(report)).energy_j_per_cycle


def best_element(names: tuple[str, ...], library: str) -> str:
    """The one of least area times period."""
    return min(names, key=lambda name: area_period(name, library))


def baselines(library: str) -> str:
    """All baselines by area times period, as text; raises what mapping any of them raises."""
    figures = {
        "tool-merged": area_period(*TOOL, library),
        "Booth": area_period(best_element(SINGLE_CYCLE, library), library),
        "two stages": area_period(best_element(PIPELINED, library), library),
    }
    return "area x period, k um2 ns: " + ", ".join(f"{name} {1e6 * value:.3g}" for name, value in figures.items())


def fastest_period(report: GateReport) -> float:
    """Seconds of the fastest mapping. Raises BitwrightError for a module without register-to-register paths."""
    if report.best_period_s is None:
        raise BitwrightError(f"{report.top} has no register-to-register path, so it has no maximum frequency.")
    return report.best_period_s


def _period(report: GateReport) -> float:
    if report.period_s is None:
        raise BitwrightError(f"{report.top} has no register-to-register path, so it has no clock period.")
    return report.period_s


def element_table_claims() -> list[Claim]:
    """Best area times period per multiply-accumulate of every element; every mapping stands in the sources."""
    found = []
    note = (
        f"serial elements are charged {_SERIAL:g} issue cycles per operand, OPT4E 2.24 / 4 with ideal lanes, on both "
        "sides; encoders that elements share are not charged"
    )
    for name, element in ELEMENTS.items():
        if not element.reference:
            continue

        def ours(name: str = name) -> Quantity:
            report = processing_element(name, REFERENCE_LIBRARY)
            text = ", ".join(
                f"{each.script} {each.area_um2 / 1e3:.1f}/{each.period_s * 1e9:.2f}"
                for each in report.candidates if each.period_s is not None
            )  # fmt: skip
            value = area_period(name, REFERENCE_LIBRARY) * 1e6
            return Quantity(value, "k um2 ns", Evidence.SYNTHESISED, f"k um2/ns by script: {text}")

        text = ", ".join(
            f"{script} {area:g}/{period:g}" for script, (area, period) in zip(_SCRIPTS, element.reference, strict=True)
        )
        published = Quantity(
            element.reference_area_period, "k um2 ns", Evidence.PUBLISHED, f"{_REFERENCE}; k um2/ns by script: {text}"
        )
        conditions = f"{name}, {REFERENCE_LIBRARY}"
        found.append(Claim("element, best area x period per MAC", conditions, published, ours, None, note))
    for name, area, period in (("MAC, Booth, one adder", 523.7, 4.32), ("OPT1", 551.6, 2.67)):

        def array(name: str = name) -> Quantity:
            gates = engine_gates(
                TensorEngine(4, 4, ELEMENTS[name].transformations or ()), find_library(REFERENCE_LIBRARY)
            )
            text = f"{gates.area_um2 / 1e3:.1f} k um2, {gates.period_s * 1e9:.2f} ns"
            return Quantity(gates.area_um2 * gates.period_s * 1e6, "k um2 ns", Evidence.SYNTHESISED, text)

        text = f"{_REFERENCE}; script a, mapped flat: {area:g} k um2, {period:g} ns"
        found.append(
            Claim(
                "array of 4x4 elements, area x period", f"{name}, output-stationary, {REFERENCE_LIBRARY}",
                Quantity(area * period, "k um2 ns", Evidence.PUBLISHED, text), array, None,
                "ours is mapped part by part, and holds its drain, its output stages and the registers of the skew",
            )
        )  # fmt: skip
    return found


def _range_claim(
    name: str, conditions: str, bounds: tuple[float, float], ours: tuple[str, ...], base: tuple[str, ...],
    library: str, figure: str, explanation: str,
) -> Claim:  # fmt: skip
    """A ratio against a range; the tolerance is half the range, None outside the library of the reference and for
    elements that the reference does not have."""
    low, high = bounds
    middle = (low + high) / 2

    def measure() -> Quantity:
        text = baselines(library)
        mine, theirs = best_element(ours, library), best_element(base, library)
        if figure == "area efficiency":
            ratio = area_period(theirs, library) / area_period(mine, library)
        elif figure == "clock":
            ratio = maximum_frequency(mine, library) / maximum_frequency(theirs, library)
        elif figure == "cell area":
            ratio = processing_element(mine, library).area_um2 / processing_element(theirs, library).area_um2
        else:
            ratio = energy_per_cycle(mine, library) / energy_per_cycle(theirs, library)
        side = "below" if ratio < low else "above" if ratio > high else "within"
        return Quantity(ratio, "x", Evidence.SYNTHESISED, f"{side} the range; {mine} over {theirs}; {text}")

    published = Quantity(middle, "x", Evidence.PUBLISHED, f"{_REFERENCE}: x{low:g} to x{high:g}")
    checked = library == REFERENCE_LIBRARY and any(ELEMENTS[each].reference for each in ours)
    where = f"{conditions}, {library}; range x{low:g} to x{high:g}"
    return Claim(
        f"element, {name}", where, published, measure, (high - low) / 2 / middle if checked else None, explanation,
        "higher" if figure in ("area efficiency", "clock") else "lower",
    )  # fmt: skip


def range_claims() -> list[Claim]:
    """Ratios of elements against the ranges of the reference, single-cycle and pipelined baselines."""
    same, piped = "the single-cycle MAC with the same Booth rows", f"the best of {len(PIPELINED)} two-stage MACs"
    opt1, tool = VARIANTS["OPT1"], "the tool's acc + a*b"
    rows = [
        ("clock", f"OPT1 over {same}", (1.45, 1.65), opt1[:1], SAME_ROWS[:1], "clock", "OPT1"),
        ("cell area", f"OPT1 over {same}", (0.95, 1.10), opt1[:1], SAME_ROWS[:1], "cell area", "OPT1"),
        ("vectorless energy per cycle", f"OPT1 over {same}", (0.9, 1.4), opt1[:1], SAME_ROWS[:1], "energy", "OPT1"),
        ("vectorless energy per cycle", f"OPT1 over {piped}", (1.1, 1.4), opt1, PIPELINED, "energy", "OPT1"),
        ("area efficiency", f"OPT1 over {tool}", (1.9, 2.1), opt1[:1], TOOL, "area efficiency", "OPT1"),
    ]
    for engine, (single, two_stage) in RANGES.items():
        names = VARIANTS[engine]
        rows += [
            ("area efficiency", f"{ours} over {same}", single, (ours,), (base,), "area efficiency", engine)
            for ours, base in zip(names, SAME_ROWS, strict=False)
        ]
        rows.append(
            ("area efficiency", f"{engine} over {piped}", two_stage, names, PIPELINED, "area efficiency", engine)
        )
    return [
        _range_claim(name, conditions, bounds, ours, base, library, figure, NOTES[engine])
        for library in LIBRARIES
        for name, conditions, bounds, ours, base, figure, engine in rows
    ]
