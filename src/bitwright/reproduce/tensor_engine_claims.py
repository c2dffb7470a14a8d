"""Claims of system 01 about elements, networks and bit-slice peers: published figures beside ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.workload import Workload
from bitwright.engine.bit_slice_engines import BitSliceClaim, claims_table
from bitwright.engine.component_areas import component_areas
from bitwright.engine.digit_profiles import normal_profile
from bitwright.engine.libraries import find_library
from bitwright.engine.network_cost import (
    EngineFigures,
    OperandStatistics,
    equal_area,
    mean_utilisation,
    network_cost,
    same_statistics,
    speed_up,
)
from bitwright.engine.published_engines import (
    MAC_AREA_UM2,
    OPT4C_AREA_UM2,
    multiply_accumulate_array,
    opt4c_array,
    opt4e_array,
    throughput_ratio,
)
from bitwright.engine.rtl import PE, generate_part
from bitwright.engine.synthesis import synthesise
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.models.operand_statistics import model_profiles, statistics_of
from bitwright.models.trace_configuration import trace_configuration
from bitwright.models.vision_shapes import mobilenet_v3_large, mobilevit_s
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.tensor_engine_arrays import array_claims, committed_array_claims, encoder_claims
from bitwright.reproduce.tensor_engine_elements import (
    LIBRARIES,
    area_period,
    element_table_claims,
    energy_per_cycle,
    fastest_period,
    frequency,
    maximum_frequency,
    processing_element,
    range_claims,
)
from bitwright.reproduce.tensor_engine_reports import (
    PRINTED_DENSITY,
    PRINTED_RATIOS,
    RATIOS,
    committed_density,
    committed_efficiency,
    committed_ratios,
)

_PAPER = "arXiv 2503.06342"
_REPORTS = "synthesis reports of the official repository, SAED 32 nm"


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def committed_claims() -> list[Claim]:
    """Ratios and densities stated in the official repository against its own reports."""
    found = []
    for design, printed in PRINTED_RATIOS.items():
        for index, what in enumerate(RATIOS):

            def ours(design: str = design, index: int = index) -> Quantity:
                return Quantity(committed_ratios(design)[index], "x", Evidence.PUBLISHED, "from the committed reports")

            name = f"OPT1 / MAC, {what}"
            found.append(Claim(name, f"{design}, SAED 32 nm", _published(printed[index], "x", _REPORTS), ours, 0.01))
    for design, (_, _, density, efficiency) in PRINTED_DENSITY.items():

        def packed(design: str = design) -> Quantity:
            return Quantity(committed_density(design), "TOPS/mm2", Evidence.PUBLISHED, "from the committed reports")

        def frugal(design: str = design) -> Quantity:
            return Quantity(committed_efficiency(design), "TOPS/W", Evidence.PUBLISHED, "from the committed reports")

        where = f"{design}, SAED 32 nm"
        found.append(Claim("density", where, _published(density, "TOPS/mm2", _REPORTS), packed, 0.02))
        if efficiency is not None:
            published = _published(efficiency, "TOPS/W", _REPORTS)
            found.append(Claim("operations per energy", where, published, frugal, 0.02, "vectorless power"))
    return found


def element_claims() -> list[Claim]:
    """Processing elements: clock, paths and area of OPT1 and OPT4C over the multiply-accumulate, per library."""
    found = []

    def add(
        what: str, library: str, published: Quantity, name: str, figure: Callable[[str, str], float], explanation: str
    ) -> None:
        def ours() -> Quantity:
            return Quantity(figure(name, library) / figure("MAC, Booth", library), "x", Evidence.SYNTHESISED)

        found.append(Claim(what, library, published, ours, None, explanation))

    drain = "ours carries two state words through its drain multiplexer; both elements with the same Booth rows"
    gates = "ours has its drain multiplexer and operand gates"
    kit = "the 28 nm kit is not public"
    paths = _published(1.95 / 0.92, "x", f"{_PAPER}, OPT1 section: paths of 1.95 and 0.92 ns at 28 nm")
    small = _published(OPT4C_AREA_UM2 / MAC_AREA_UM2, "x", f"{_PAPER}: 81.27 and 246 um2 at 28 nm")
    for library in LIBRARIES:
        for what, committed, figure in zip(
            RATIOS, committed_ratios("PE"), (frequency, _area, _efficiency, energy_per_cycle), strict=True
        ):
            add(f"OPT1 / MAC PE, {what}", library, _published(committed, "x", _REPORTS), "OPT1", figure, drain)
        add("MAC / OPT1 PE, critical path", library, paths, "OPT1", maximum_frequency, kit)
        add("OPT4C / MAC PE, cell area", library, small, "OPT4C", _area, gates)
    library = "predictive-28nm"
    for name, path_ns in (("MAC, Booth", 1.95), ("OPT1", 0.92), ("OPT4C", 0.29), ("OPT4E", 0.40)):

        def path(name: str = name) -> Quantity:
            period_s = 1 / maximum_frequency(name, library)
            return Quantity(period_s, "s", Evidence.SYNTHESISED, "with set-up and clock-to-output times")

        published = _published(path_ns * 1e-9, "s", f"{_PAPER}, SMIC 28 nm")
        found.append(Claim("critical path of an element", f"{name}, {library}", published, path, None, kit))

    def peak() -> Quantity:
        return Quantity(maximum_frequency("OPT3", library), "Hz", Evidence.SYNTHESISED)

    published = _published(2.5e9, "Hz", f"{_PAPER}, PE figure")
    found.append(Claim("highest clock of an element", f"OPT3, {library}", published, peak, None, kit))

    def wider() -> Quantity:
        engines = [TensorEngine(16, 16, ("opt1",), accumulator_bits=bits) for bits in (24, 32)]
        periods = [fastest_period(synthesise(generate_part(each, PE), PE, find_library(library))) for each in engines]
        return Quantity(periods[1] / periods[0], "x", Evidence.SYNTHESISED, "OPT1, 32 over 24 bits, smallest periods")

    same = _published(1.0, "x", f"{_PAPER}, OPT1 section: the path is independent of the width")
    found.append(Claim("critical path over accumulator width", f"OPT1, {library}", same, wider, 0.1))
    growth = (
        "the smallest mappings found for the two clocks, the faster one at the highest clock we reach, not at 28 nm; "
        "five scripts without sizing towards a clock span less area than a commercial tool does"
    )
    for name, slow, fast, ratio in (
        ("MAC, Booth", 1.0, 1.5, 707 / 367), ("OPT1", 1.0, 1.5, 1.14), ("OPT3", 1.5, 2.0, 1.09)
    ):  # fmt: skip

        def grown(name: str = name, clocks: float = fast / slow) -> Quantity:
            return Quantity(area_growth(name, library, clocks), "x", Evidence.SYNTHESISED)

        conditions = f"{name}, from {slow} to {fast} GHz; ours {library}, clock x{fast / slow:.3g}"
        published = _published(ratio, "x", f"{_PAPER}, PE figure, 28 nm")
        found.append(Claim("area growth with frequency", conditions, published, grown, None, growth))

    def adders() -> Quantity:
        split = component_areas(TensorEngine(16, 16), find_library("osu018"))
        logic = sum(
            area for name, area in split.items() if name in ("encoder", "partial products", "compressor", "adders")
        )
        return Quantity(100 * split["adders"] / logic, "%", Evidence.SYNTHESISED, "components mapped alone, osu018")

    def delays() -> Quantity:
        raise BitwrightError("components are optimised together: the path of a mapped element has no component borders")

    share = "both adders of the element, each component mapped alone and no faster than the element's clock asks"
    for what, value, measure in (("area", 61.4, adders), ("delay", 74.6, delays)):
        name = f"final adder and accumulator, share of the logic {what}"
        found.append(Claim(name, "MAC, 32-bit accumulator", _published(value, "%", _PAPER), measure, None, share))

    def best_case() -> Quantity:
        ratio = energy_per_cycle("OPT4C", library) / energy_per_cycle("MAC, Booth", library)
        return Quantity(ratio, "x", Evidence.SYNTHESISED, f"vectorless, elements alone, {library}")

    third = _published(2 / 3, "x", f"{_PAPER}, workload figure: a third less")
    found.append(
        Claim("energy per MAC, best case", "one OPT4C over one MAC, one digit per operand", third, best_case, None)
    )
    return found


def _area(name: str, library: str) -> float:
    return processing_element(name, library).area_um2


def _efficiency(name: str, library: str) -> float:
    return 1 / area_period(name, library)


def area_growth(name: str, library: str, clocks: float) -> float:
    """Area of the smallest mapping at the highest clock found over that of the smallest at `clocks` times less."""
    candidates = [
        (each.period_s, each.area_um2) for each in processing_element(name, library).candidates if each.period_s
    ]
    shortest = min(period for period, _ in candidates)
    fast = min(area for period, area in candidates if period <= shortest * (1 + 1e-9))
    return fast / min(area for period, area in candidates if period <= shortest * clocks)


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
    implied = (
        "the clock of our OPT4C, twice that of the MAC, is taken from this statement, so it agrees by construction"
    )
    for digits, value, case in ((4, 0.5, "four digits in every operand, worst case"), (1, 2.0, "one digit, best case")):

        def one(digits: int = digits) -> Quantity:
            one_element = replace(mac, element_area_um2=OPT4C_AREA_UM2)
            return Quantity(throughput_ratio(opt4c_array(), one_element, digits), "x", Evidence.PREDICTED)

        published = _published(value, "x", f"{_PAPER}, workload figure")
        found.append(Claim("throughput of one element", f"OPT4C over MAC, {case}", published, one, None, implied))
    works: tuple[tuple[str, float, Callable[[], Workload]], ...] = (
        ("GPT-2, 1,024 tokens", 2.16, lambda: trace_configuration("gpt2", tokens=1024)),
        ("ViT-B/16", 2.02, lambda: trace_configuration("vit-b-16")),
        ("MobileViT-S", 1.89, mobilevit_s),
    )
    explanation = (
        "the engine behind the published figure is not named; layers whose kind the measured model does not have "
        "(convolutions) take normal data; encoders and adders have no published area and are not charged"
    )
    for network, value, work in works:
        for label, build in (("OPT4C", opt4c_array), ("OPT4E", opt4e_array)):
            for name, digits_of in STATISTICS.items():

                def faster(
                    work: Callable[[], Workload] = work, build: Callable[[], EngineFigures] = build,
                    digits_of: Callable[[], OperandStatistics] = digits_of, name: str = name,
                ) -> Quantity:  # fmt: skip
                    workload, engine = work(), equal_area(build(), mac)
                    gain = speed_up(network_cost(workload, engine, digits_of()), network_cost(workload, mac))
                    return Quantity(gain, "x", Evidence.PREDICTED, f"published areas, {name}, 32x32 baseline")

                conditions = f"{network}, {label}, {name}; systolic array of the same area"
                published = _published(value, "x", _PAPER)
                found.append(Claim("end to end at equal area", conditions, published, faster, 0.15, explanation))
    for label, build in (("OPT4C", opt4c_array), ("OPT4E", opt4e_array)):

        def used(build: Callable[[], EngineFigures] = build) -> Quantity:
            cost = network_cost(mobilenet_v3_large(), build(), same_statistics(normal_profile()))
            layers = [each for each in cost.products if each.name.startswith("blocks") and "squeeze" not in each.name]
            deep = [each for each in layers if each.name.endswith("depthwise")]
            wide = [each for each in layers if not each.name.endswith("depthwise")]
            return Quantity(mean_utilisation(deep) / mean_utilisation(wide), "x", Evidence.PREDICTED, "normal data")

        less = _published(1.0, "x", f"{_PAPER}, workload figures: lower, given as bars only")
        conditions = f"MobileNetV3-Large, {label}, depthwise over pointwise layers; published: below 1"
        found.append(Claim("utilisation", conditions, less, used, None, "short sums over K leave columns waiting"))
    return found


def _measured(model: str) -> OperandStatistics:
    normal = normal_profile()
    return statistics_of(model_profiles(model), (normal, normal))


# Where the digit statistics of networks come from.
STATISTICS: dict[str, Callable[[], OperandStatistics]] = {
    "digits of MiniLM": lambda: _measured("minilm"),
    "digits of SmolLM2-135M": lambda: _measured("smollm2-135m"),
    "digits of normal data": lambda: same_statistics(normal_profile()),
}


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
        *committed_claims(), *network_claims(), *bit_slice_claims(), *element_claims(), *element_table_claims(),
        *range_claims(), *committed_array_claims(), *encoder_claims(), *array_claims(),
    ]  # fmt: skip
