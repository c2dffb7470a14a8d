"""System 01: bit-weight transformations of tensor processing engines (HPCA 2025, arXiv 2503.06342).

So far: digit encodings and their statistics, the output-stationary array with plain and with compressed accumulation
(OPT1), and the ratios of the synthesis reports published with the paper. The other engines of the paper are planned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import encodings
from bitwright.arithmetic.statistics import digit_statistics
from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import PE, TOP, generate, generate_processing_element
from bitwright.engine.synthesis import ArrayReport, GateReport, synthesise, synthesise_array
from bitwright.engine.systolic import SystolicArray
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.arithmetic.encodings.get",
    "bitwright.arithmetic.statistics.digit_statistics",
    "bitwright.engine.processing_elements.compressed_accumulation",
    "bitwright.engine.systolic.cycles",
    "bitwright.engine.rtl.generate",
    "bitwright.engine.synthesis.synthesise_array",
)
_PAPER = "arXiv 2503.06342"
_REPORTS = "synthesis reports of the official repository, SAED 32 nm"


@dataclass(frozen=True)
class CommittedReport:
    """One published synthesis result: constraint and arrival (ns), cell area (um2), power (mW) at the constraint."""

    constraint_ns: float
    arrival_ns: float
    area_um2: float
    power_mw: float

    @property
    def energy_pj(self) -> float:
        """Energy per cycle."""
        return self.power_mw * self.constraint_ns


# The fastest constraint that was met, for plain and for compressed accumulation.
COMMITTED = {
    "PE": (CommittedReport(1.667, 1.61, 1449.4, 0.280), CommittedReport(1.11, 1.06, 1498.7, 0.554)),
    "output-stationary 16x16": (CommittedReport(6.5, 6.44, 376_683, 27.6), CommittedReport(3.1, 3.04, 362_483, 56.4)),
    "weight-stationary 16x16": (CommittedReport(5.5, 5.44, 276_542, 19.0), CommittedReport(3.3, 3.25, 311_258, 40.1)),
    "3D-cube 8x8x8": (CommittedReport(6.3, 6.24, 498_012, 34.1), CommittedReport(4.0, 3.89, 524_725, 58.4)),
}
# Average partial products under EN-T of N(0, sigma) INT8 vectors of K operands, README of the official repository.
PARTIAL_PRODUCTS = {
    32: {10: 1.71, 20: 2.05, 30: 2.27, 40: 2.45, 50: 2.57},
    128: {10: 1.75, 20: 2.10, 30: 2.32, 40: 2.48, 50: 2.60},
}


def committed_ratios(design: str) -> tuple[float, float, float, float]:
    """Compressed over plain accumulation: frequency, cell area, area efficiency, energy per cycle."""
    plain, compressed = COMMITTED[design]
    frequency = plain.arrival_ns / compressed.arrival_ns
    area = compressed.area_um2 / plain.area_um2
    return frequency, area, frequency / area, compressed.energy_pj / plain.energy_pj


def processing_element(name: str, library: str) -> GateReport:
    """One INT8 processing element with a 32-bit accumulator, synthesised for the best area times delay."""
    array = SystolicArray(rows=1, columns=1, processing_element=name)
    return synthesise(generate_processing_element(array), PE, find_library(library))


def processing_array(name: str, library: str) -> ArrayReport:
    """A 16x16 output-stationary array, synthesised for the best area times delay."""
    array = SystolicArray(rows=16, columns=16, processing_element=name)
    return synthesise_array(generate(array), TOP, find_library(library))


def average_partial_products(sigma: float, depth: int, vectors: int = 1000, seed: int = 0) -> float:
    """Mean number of non-zero EN-T digits as the released test bench counts it, on vectors of `depth` operands.

    Samples of N(0, sigma) outside -128..127 are drawn again and the rest rounded. The bench adds up the digits of each
    group of four operands at one bit weight; where the last group of a vector has at most one digit, its `encode_valid`
    stays high for another cycle and the group is counted twice. That makes the published means depend on the depth.
    Source: test_opt3_pe_inner_product_vectors.sv of the official repository.
    """
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, sigma, (vectors, depth))
    while (outside := (samples < -128) | (samples > 127)).any():
        samples[outside] = rng.normal(0, sigma, int(outside.sum()))
    nonzero = encodings.get("ent").digits(np.rint(samples).astype(np.int64), 8) != 0
    counts = nonzero.reshape(vectors, depth // 4, 4, -1).sum(axis=2)
    last = counts[:, -1, -1]
    twice = last <= 1
    return float((counts.sum() + last[twice].sum()) / (counts.size + twice.sum()))


def _normal_to_127(shape: tuple[int, int]) -> NDArray[np.int8]:
    """Normal samples, the largest mapped to 127."""
    samples = np.random.default_rng(0).normal(0, 1, shape)
    codes: NDArray[np.int8] = np.rint(samples * (127 / np.abs(samples).max())).astype(np.int8)
    return codes


def _executed(value: float, unit: str) -> Quantity:
    return Quantity(value, unit, Evidence.EXECUTED)


def _digit_claims() -> list[Claim]:
    def published(value: float, unit: str = "digits") -> Quantity:
        return Quantity(value, unit, Evidence.PUBLISHED, _PAPER)

    def at_most_three() -> Quantity:
        every = np.arange(-128, 128).astype(np.int8)
        shares = digit_statistics(every, encodings.get("mbe")).shares
        return _executed(100 * float(shares[:4].sum()), "%")

    found = [
        Claim(
            "values with at most three non-zero digits", "modified Booth, all 256 INT8 values", published(68.4, "%"),
            at_most_three, 0.001,
        )
    ]  # fmt: skip
    for name, figure in (("ent", 2.22), ("mbe", 2.41)):

        def mean(name: str = name) -> Quantity:
            return _executed(digit_statistics(_normal_to_127((1024, 1024)), encodings.get(name)).mean, "digits")

        conditions = f"{name}, normal data, largest of 1024x1024 samples mapped to 127"
        found.append(Claim("mean non-zero digits", conditions, published(figure), mean, 0.03))
    for depth, row in PARTIAL_PRODUCTS.items():
        for sigma, figure in row.items():

            def counted(sigma: int = sigma, depth: int = depth) -> Quantity:
                return _executed(average_partial_products(sigma, depth), "digits")

            conditions = f"EN-T, N(0, {sigma}), K = {depth}"
            counting = "counted as the released test bench does, which takes some last groups of a vector twice"
            found.append(Claim("average partial products", conditions, published(figure), counted, 0.03, counting))
    return found


def _gate_claims() -> list[Claim]:
    """Published ratios are those of the committed reports, fastest constraint met; ours are under other libraries."""
    found = []
    explanation = (
        "published: SAED 32 nm (elements), SMIC 28 nm (array), commercial tools; ours: the named library, Yosys and "
        "ABC, before placement, both elements with the same Booth rows"
    )

    def add(what: str, conditions: str, published: Quantity, measure: Callable[[], float]) -> None:
        ours = lambda: Quantity(measure(), "x", Evidence.SYNTHESISED)  # noqa: E731
        found.append(Claim(what, conditions, published, ours, None, explanation))

    frequency, area, _, _ = committed_ratios("PE")
    for library in ("predictive-28nm", "predictive-45nm", "predictive-180nm", "osu018"):

        def ratio(figure: Callable[[GateReport], float], library: str = library) -> float:
            return figure(processing_element("compressed-accumulation", library)) / figure(
                processing_element("multiply-accumulate", library)
            )

        def reported(value: float) -> Quantity:
            return Quantity(value, "x", Evidence.PUBLISHED, _REPORTS)

        conditions = library
        add("OPT1 / MAC PE, maximum frequency", conditions, reported(frequency), lambda r=ratio: r(_frequency))  # type: ignore[misc]
        add("OPT1 / MAC PE, cell area", conditions, reported(area), lambda r=ratio: r(_area))  # type: ignore[misc]

    def array_efficiency() -> float:
        plain, compressed = (
            processing_array(name, "predictive-28nm") for name in ("multiply-accumulate", "compressed-accumulation")
        )
        return plain.area_um2 * plain.period_s / (compressed.area_um2 * compressed.period_s)

    add(
        "OPT1 / MAC systolic array, area efficiency",
        "16x16 output stationary, predictive-28nm",
        Quantity(1.27, "x", Evidence.PUBLISHED, f"{_PAPER}, abstract"),
        array_efficiency,
    )
    return found


def _frequency(report: GateReport) -> float:
    if report.maximum_frequency_hz is None:
        raise BitwrightError(f"{report.top} has no register-to-register path, so it has no maximum frequency.")
    return report.maximum_frequency_hz


def _area(report: GateReport) -> float:
    return report.area_um2


def claims() -> tuple[Claim, ...]:
    """Every claim that can be checked so far."""
    return (*_digit_claims(), *_gate_claims())
