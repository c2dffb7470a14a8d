"""Claims of system 01 about gates, networks and bit-slice peers: published figures beside ours."""

from __future__ import annotations

from collections.abc import Callable

from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.workload import Workload
from bitwright.engine.bit_slice_engines import BitSliceClaim, claims_table
from bitwright.engine.component_areas import component_areas
from bitwright.engine.digit_profiles import normal_profile
from bitwright.engine.engine_gates import engine_gates
from bitwright.engine.libraries import find_library
from bitwright.engine.network_cost import EngineFigures, equal_area, network_cost, speed_up
from bitwright.engine.published_engines import (
    MAC_AREA_UM2,
    OPT4C_AREA_UM2,
    multiply_accumulate_array,
    opt4c_array,
    opt4e_array,
    throughput_ratio,
)
from bitwright.engine.rtl import PE, generate_part
from bitwright.engine.synthesis import GateReport, synthesise
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.models.operand_statistics import model_profiles, statistics_of
from bitwright.models.trace_configuration import trace_configuration
from bitwright.models.vision_shapes import mobilevit_s
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.tensor_engine_reports import (
    DENSITY,
    PRINTED_RATIOS,
    committed_density,
    committed_ratios,
)
from bitwright.reproduce.tensor_engine_variants import ARCHITECTURES, Architecture, best, measured

_PAPER = "arXiv 2503.06342"
_REPORTS = "synthesis reports of the official repository, SAED 32 nm"
LIBRARIES = ("predictive-28nm", "predictive-45nm", "predictive-180nm", "osu018")
ARRAY_LIBRARIES = ("predictive-28nm", "osu018")
_CONDITIONS = (
    "published: SMIC 28 nm, commercial tools, after placement; ours: the named library, Yosys and ABC, before "
    "placement, zero-delay activity of normal INT8 operands at K = 768"
)


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def committed_claims() -> list[Claim]:
    """Ratios and densities stated in the official repository against its own reports."""
    found = []
    for design, printed in PRINTED_RATIOS.items():
        for index, what in enumerate(("frequency", "cell area", "area efficiency", "energy per cycle")):

            def ours(design: str = design, index: int = index) -> Quantity:
                return Quantity(committed_ratios(design)[index], "x", Evidence.PUBLISHED, "from the committed reports")

            name = f"OPT1 / MAC, {what}"
            found.append(Claim(name, f"{design}, SAED 32 nm", _published(printed[index], "x", _REPORTS), ours, 0.01))
    for design, figure in DENSITY.items():

        def density(design: str = design) -> Quantity:
            return Quantity(committed_density(design), "TOPS/mm2", Evidence.PUBLISHED, "from the committed reports")

        found.append(Claim("density", f"{design}, SAED 32 nm", _published(figure, "TOPS/mm2", _REPORTS), density, 0.02))
    return found


def processing_element(transformations: tuple[str, ...], library: str, encoding: str = "mbe") -> GateReport:
    """One INT8 processing element with a 32-bit accumulator, synthesised for the best area times delay."""
    engine = TensorEngine(16, 16, transformations, encoding=encoding)
    return synthesise(generate_part(engine, PE), PE, find_library(library))


def _frequency(report: GateReport) -> float:
    if report.maximum_frequency_hz is None:
        raise BitwrightError(f"{report.top} has no register-to-register path, so it has no maximum frequency.")
    return report.maximum_frequency_hz


def element_claims() -> list[Claim]:
    """Processing elements: clock and area of OPT1 and OPT4C over the multiply-accumulate, per library."""
    found = []

    def add(
        what: str, library: str, published: Quantity, names: tuple[str, ...], figure: Callable[[GateReport], float],
        explanation: str,
    ) -> None:  # fmt: skip
        def ours() -> Quantity:
            ratio = figure(processing_element(names, library)) / figure(processing_element((), library))
            return Quantity(ratio, "x", Evidence.SYNTHESISED)

        found.append(Claim(what, library, published, ours, None, explanation))

    frequency, area, _, _ = committed_ratios("PE")
    drain = "ours carries two state words through its drain multiplexer; both elements with the same Booth rows"
    paths = _published(1.95 / 0.92, "x", f"{_PAPER}, OPT1 section: paths of 1.95 and 0.92 ns at 28 nm")
    small = _published(OPT4C_AREA_UM2 / MAC_AREA_UM2, "x", f"{_PAPER}: 81.27 and 246 um2 at 28 nm")
    for library in LIBRARIES:
        reports = _published(frequency, "x", _REPORTS)
        add("OPT1 / MAC PE, maximum frequency", library, reports, ("opt1",), _frequency, drain)
        add("OPT1 / MAC PE, critical path", library, paths, ("opt1",), _frequency, "the 28 nm kit is not public")
        add("OPT1 / MAC PE, cell area", library, _published(area, "x", _REPORTS), ("opt1",), _area, drain)
        add(
            "OPT4C / MAC PE, cell area",
            library,
            small,
            ("opt4c",),
            _area,
            "ours has its drain multiplexer and operand gates",
        )
    for name, low, high, ratio in (("MAC", 1.0, 1.5, 707 / 367), ("OPT1", 1.0, 1.5, 1.14), ("OPT3", 1.5, 2.0, 1.09)):

        def kit() -> Quantity:
            raise BitwrightError("area over frequency of a 28 nm kit that is not public: carried as published")

        conditions = f"{name}, from {low} to {high} GHz, 28 nm"
        found.append(Claim("area growth with frequency", conditions, _published(ratio, "x", _PAPER), kit, None))

    def adders() -> Quantity:
        split = component_areas(TensorEngine(16, 16), find_library("osu018"))
        logic = sum(
            area for name, area in split.items() if name in ("encoder", "partial products", "compressor", "adders")
        )
        return Quantity(100 * split["adders"] / logic, "%", Evidence.SYNTHESISED, "components mapped alone, osu018")

    share = "both adders of the element, each component mapped alone and no faster than the element's clock asks"
    found.append(
        Claim("final adder and accumulator, share of the logic area", "MAC, 32-bit accumulator",
              _published(61.4, "%", _PAPER), adders, None, share)
    )  # fmt: skip
    return found


def _area(report: GateReport) -> float:
    return report.area_um2


def array_ratio(architecture: Architecture, library: str, figure: str, kinds: tuple[str, ...]) -> Quantity:
    """Best transformed engine over best honest baseline in one figure, "area_efficiency" or "energy_j_per_mac"."""
    base_name, base = best(measured(architecture, library, "baselines"), figure)
    found = {names: gates for kind in kinds for names, gates in measured(architecture, library, kind).items()}
    name, ours = best(found, figure)
    ratio = getattr(ours, figure) / getattr(base, figure)
    value = ratio if figure == "area_efficiency" else 1 / ratio
    evidence = Evidence.SYNTHESISED if figure == "area_efficiency" else Evidence.SIMULATED
    return Quantity(float(value), "x", evidence, f"{name} over {base_name}")


def array_claims() -> list[Claim]:
    """Area and energy efficiency of the four architectures over their best honest baseline, per library.

    Two rows each: engines of the same dataflow (OPT1, OPT2, as published), and with digit-serial columns too.
    """
    found = []
    note = {"multiplier-adder tree": (1.58, 1.49), "2D-matrix": (1.34, 1.11)}
    for architecture in ARCHITECTURES:
        for library in ARRAY_LIBRARIES:
            for what, figure, published, index in (
                ("area efficiency", "area_efficiency", architecture.published_area, 0),
                ("energy efficiency", "energy_j_per_mac", architecture.published_energy, 1),
            ):
                where = f"{_PAPER}, abstract"
                if architecture.name in note and note[architecture.name][index] != published:
                    where += f" (a public reading note of the array table gives x{note[architecture.name][index]})"
                for kinds, label in (
                    (("transformed",), "OPT1, OPT2"),
                    (("transformed", "serial"), "with serial columns"),
                ):

                    def ours(
                        architecture: Architecture = architecture, library: str = library, figure: str = figure,
                        kinds: tuple[str, ...] = kinds,
                    ) -> Quantity:  # fmt: skip
                        return array_ratio(architecture, library, figure, kinds)

                    conditions = f"{architecture.name}, {label}, {library}; best of each over the best of the baselines"
                    found.append(Claim(what, conditions, _published(published, "x", where), ours, None, _CONDITIONS))
    return found


def encoder_claims() -> list[Claim]:
    """EN-T encoders shared at the array edge, against Booth encoders in every element."""
    found = []
    for what, figure, values in (
        ("EN-T alone, area efficiency", "area_efficiency", (8.7, 12.2, 11.0)),
        ("EN-T alone, energy efficiency", "energy_j_per_mac", (13.0, 17.5, 15.5)),
    ):

        def ours(figure: str = figure) -> Quantity:
            cells = find_library("predictive-28nm")
            plain = engine_gates(TensorEngine(16, 16), cells)
            shared = engine_gates(TensorEngine(16, 16, ("hoist_encode",), encoding="ent"), cells)
            ratio = getattr(shared, figure) / getattr(plain, figure)
            gain = ratio - 1 if figure == "area_efficiency" else 1 / ratio - 1
            return Quantity(100 * gain, "%", Evidence.SYNTHESISED, "16x16 output-stationary, predictive-28nm")

        for size, value in zip(("256 GOPS", "1 TOPS", "4 TOPS"), values, strict=True):
            published = _published(value, "%", "arXiv 2404.11887, abstract")
            explanation = "published: mean over five array types; ours: one array, digit codes of 12 bits travel"
            found.append(Claim(what, f"{size}; ours 16x16", published, ours, None, explanation))
    return found


def network_claims() -> list[Claim]:
    """Equal-area engines from published element areas: throughput per element, and whole networks."""
    mac = multiply_accumulate_array()
    found = []
    for name, build, value in (("3 OPT4C", opt4c_array, 2.7), ("1 OPT4E", opt4e_array, 3.6)):
        for cycles, what, tolerance in (
            (2.22, "2.22 digits per operand, as published", 0.05),
            (normal_profile().digits, "non-zero digits of normal data", 0.05),
            (normal_profile().issue_cycles, "issue cycles of normal data, idle ones included", None),
        ):

            def ratio(build: Callable[[], EngineFigures] = build, cycles: float = cycles) -> Quantity:
                return Quantity(throughput_ratio(build(), mac, cycles), "x", Evidence.PREDICTED, "published areas")

            conditions = f"{name} on the area of one MAC; {what}"
            found.append(
                Claim("throughput at equal area", conditions, _published(value, "x", _PAPER), ratio, tolerance)
            )
    works: tuple[tuple[str, float, Callable[[], Workload]], ...] = (
        ("GPT-2, 1,024 tokens", 2.16, lambda: trace_configuration("gpt2", tokens=1024)),
        ("ViT-B/16", 2.02, lambda: trace_configuration("vit-b-16")),
        ("MobileViT-S", 1.89, mobilevit_s),
    )
    for network, value, work in works:
        for label, build, tolerance in (("OPT4C", opt4c_array, 0.15), ("OPT4E", opt4e_array, 0.15)):

            def faster(work: Callable[[], Workload] = work, build: Callable[[], EngineFigures] = build) -> Quantity:
                workload = work()
                normal = normal_profile()
                statistics = statistics_of(model_profiles("minilm"), (normal, normal))
                engine = equal_area(build(), mac)
                gain = speed_up(network_cost(workload, engine, statistics), network_cost(workload, mac))
                return Quantity(gain, "x", Evidence.PREDICTED, "published areas, digits of MiniLM, 32x32 baseline")

            explanation = (
                "the engine behind the published figure is not named; layers whose kind MiniLM does not have "
                "(convolutions) take normal data; encoders and adders have no published area and are not charged"
            )
            conditions = f"{network}, {label}, systolic array of the same area"
            published = _published(value, "x", _PAPER)
            found.append(Claim("end to end at equal area", conditions, published, faster, tolerance, explanation))
    return found


def bit_slice_claims() -> list[Claim]:
    """Laconic, Bitlet, Sibia and BitWave on the same operands, with published or assumed areas."""

    def claim(entry: BitSliceClaim) -> Claim:
        def ours() -> Quantity:
            if entry.ours is None:
                raise BitwrightError(entry.explanation)
            return entry.ours

        return Claim(entry.name, entry.conditions, entry.published, ours, None, entry.explanation)

    return [claim(entry) for entry in claims_table()]


def all_claims() -> list[Claim]:
    """Every claim of this module, cheap ones first."""
    return [
        *committed_claims(), *network_claims(), *bit_slice_claims(), *element_claims(), *encoder_claims(),
        *array_claims(),
    ]  # fmt: skip
