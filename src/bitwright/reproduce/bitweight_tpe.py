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
from bitwright.arithmetic.quantise import quantise_symmetric
from bitwright.arithmetic.statistics import digit_statistics
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.libraries import find_library
from bitwright.engine.rtl import PE, generate_processing_element
from bitwright.engine.synthesis import GateReport, synthesise
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
# Ratios of those rows: frequency, area, area efficiency, energy per cycle.
_RATIOS = {
    "PE": (1.52, 1.03, 1.47, 1.32),
    "output-stationary 16x16": (2.12, 0.96, 2.20, 0.97),
    "weight-stationary 16x16": (1.67, 1.13, 1.49, 1.27),
    "3D-cube 8x8x8": (1.60, 1.05, 1.52, 1.09),
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


def _element_ratio(library: str, figure: Callable[[GateReport], float]) -> Quantity:
    plain = processing_element("multiply-accumulate", library)
    compressed = processing_element("compressed-accumulation", library)
    return Quantity(
        figure(compressed) / figure(plain), "x", Evidence.SYNTHESISED, f"{plain.library} cells, {plain.tool}"
    )


def _frequency(report: GateReport) -> float:
    return report.maximum_frequency_hz or 0.0


def _area(report: GateReport) -> float:
    return report.area_um2


def _normal(sigma: float | None, shape: tuple[int, int]) -> NDArray[np.int8]:
    """INT8 samples of a normal distribution; without sigma, the largest sample is mapped to 127."""
    samples = np.random.default_rng(0).normal(0, sigma or 1.0, shape)
    if sigma is None:
        samples *= 127 / np.abs(samples).max()
    return np.clip(np.rint(samples), -128, 127).astype(np.int8)


def _mean_digits(encoding: str, values: Callable[[], NDArray[np.int8]]) -> Callable[[], Quantity]:
    def measure() -> Quantity:
        return Quantity(digit_statistics(values(), encodings.get(encoding)).mean, "digits", Evidence.EXECUTED)

    return measure


def _minilm_weights(per_channel: bool) -> NDArray[np.int8]:
    """All 36 linear weights of the encoder layers of MiniLM, INT8."""
    from torch import nn

    from bitwright.models.load import load

    layers = [module for module in load("minilm").encoder.layers.modules() if isinstance(module, nn.Linear)]
    axis = 0 if per_channel else None
    codes = [quantise_symmetric(layer.weight.detach().numpy(), 8, axis=axis).codes.reshape(-1) for layer in layers]
    return np.concatenate(codes)


def _digit_claims() -> list[Claim]:
    def published(value: float) -> Quantity:
        return Quantity(value, "digits", Evidence.PUBLISHED, _PAPER)

    every = np.arange(-128, 128).astype(np.int8)
    found = [
        Claim(
            "values with at most three non-zero digits", "modified Booth, all 256 INT8 values",
            Quantity(68.4, "%", Evidence.PUBLISHED, _PAPER),
            lambda: Quantity(
                100 * float(digit_statistics(every, encodings.get("mbe")).shares[:4].sum()), "%", Evidence.EXECUTED
            ),
            0.001,
        )
    ]  # fmt: skip
    for name, figure in (("ent", 2.22), ("mbe", 2.41)):
        conditions = f"{name}, normal data, largest of 1024x1024 samples mapped to 127"
        data = _mean_digits(name, lambda: _normal(None, (1024, 1024)))
        found.append(Claim("mean non-zero digits", conditions, published(figure), data, 0.03))
    for sigma, figure in zip((10, 20, 30, 40, 50), (1.75, 2.10, 2.32, 2.48, 2.60), strict=True):
        conditions = f"ent, N(0, {sigma}) rounded, K = 128"
        data = _mean_digits("ent", lambda sigma=sigma: _normal(sigma, (8192, 128)))  # type: ignore[misc]
        found.append(Claim("mean partial products", conditions, published(figure), data, 0.03))
    for per_channel, figures in ((True, (2.37, 2.55)), (False, (1.59, 1.73))):
        for name, figure in zip(("ent", "mbe"), figures, strict=True):
            conditions = f"{name}, 36 linear weights of MiniLM, INT8 per {'channel' if per_channel else 'tensor'}"
            data = _mean_digits(name, lambda per_channel=per_channel: _minilm_weights(per_channel))  # type: ignore[misc]
            figure_source = Quantity(
                figure, "digits", Evidence.PUBLISHED, "measured before with other code on the same weights"
            )
            found.append(Claim("mean non-zero digits", conditions, figure_source, data, 0.02))
    return found


def _committed_claims() -> list[Claim]:
    names = ("frequency", "cell area", "area efficiency", "energy per cycle")
    return [
        Claim(
            f"OPT1 / MAC, {figure}", f"{design}, ratio recomputed from the committed reports",
            Quantity(value, "x", Evidence.PUBLISHED, _REPORTS),
            lambda design=design, place=place: Quantity(  # type: ignore[misc]
                committed_ratios(design)[place], "x", Evidence.PUBLISHED, _REPORTS
            ),
            0.01,
        )
        for design, ratios in _RATIOS.items()
        for place, (figure, value) in enumerate(zip(names, ratios, strict=True))
    ]  # fmt: skip


def _gate_claims() -> list[Claim]:
    found = []
    for library in ("predictive-28nm", "predictive-45nm", "predictive-180nm", "osu018"):
        for name, value, figure in (("maximum frequency", 1.52, _frequency), ("cell area", 1.03, _area)):
            found.append(
                Claim(
                    f"OPT1 / MAC PE, {name}", f"{library}; published under SAED 32 nm with a commercial tool",
                    Quantity(value, "x", Evidence.PUBLISHED, _REPORTS),
                    lambda library=library, figure=figure: _element_ratio(library, figure),  # type: ignore[misc]
                    None,
                    "another library and another synthesis tool; both elements with the same Booth rows and before placement",
                )
            )  # fmt: skip
    return found


def claims() -> tuple[Claim, ...]:
    """Every claim that can be checked so far."""
    return (*_digit_claims(), *_committed_claims(), *_gate_claims())
