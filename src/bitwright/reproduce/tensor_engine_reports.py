"""Synthesis reports that the official repository of the paper commits: SAED 32 nm educational kit, TT 0.85 V 25 C,
Design Compiler with retiming, vectorless power at the constraint. Carried as data; the kit itself is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass


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
# The ratios printed beside them: frequency, cell area, area efficiency, energy per cycle.
PRINTED_RATIOS = {
    "PE": (1.52, 1.03, 1.47, 1.32),
    "output-stationary 16x16": (2.12, 0.96, 2.20, 0.97),
    "weight-stationary 16x16": (1.67, 1.13, 1.49, 1.27),
    "3D-cube 8x8x8": (1.60, 1.05, 1.52, 1.09),
}
# OPT2 for 16 x N operands and the OPT4C column of N elements (its power was not committed).
OPT2 = {
    4: CommittedReport(1.35, 1.30, 67_172, 22.6), 8: CommittedReport(1.35, 1.29, 126_543, 42.0),
    16: CommittedReport(1.45, 1.40, 230_216, 70.9), 32: CommittedReport(1.50, 1.44, 462_717, 139.8),
}  # fmt: skip
OPT4C_COLUMN = {
    32: ((1.4, 1.30, 23_671), (1.0, 0.95, 26_548), (0.8, 0.74, 29_915), (0.6, 0.55, 30_690), (0.59, 0.54, 30_878)),
    16: ((1.4, 1.30, 11_789), (1.0, 0.95, 12_956), (0.58, 0.53, 15_854)),
}
# TOPS per mm2 stated for the same reports.
DENSITY = {"MAC, output-stationary": 0.21, "OPT1, output-stationary": 0.46, "OPT2, N = 32": 1.48}


def committed_ratios(design: str) -> tuple[float, float, float, float]:
    """Compressed over plain accumulation: frequency, cell area, area efficiency, energy per cycle."""
    plain, compressed = COMMITTED[design]
    frequency = plain.arrival_ns / compressed.arrival_ns
    area = compressed.area_um2 / plain.area_um2
    return frequency, area, frequency / area, compressed.energy_pj / plain.energy_pj


def committed_density(design: str) -> float:
    """Operations (two per multiply-accumulate) per second and area, TOPS/mm2, from area and constraint of a report."""
    macs, report = {
        "MAC, output-stationary": (256, COMMITTED["output-stationary 16x16"][0]),
        "OPT1, output-stationary": (256, COMMITTED["output-stationary 16x16"][1]),
        "OPT2, N = 32": (512, OPT2[32]),
    }[design]
    return 2 * macs / (report.constraint_ns * 1e-9) / 1e12 / (report.area_um2 / 1e6)
