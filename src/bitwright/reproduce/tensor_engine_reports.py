"""Synthesis reports that the official repository of the paper commits: SAED 32 nm educational kit, TT 0.85 V 25 C,
Design Compiler with retiming, vectorless power at the constraint. Carried as data; the kit itself is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.core.errors import InputError


@dataclass(frozen=True)
class CommittedReport:
    """One published synthesis result: constraint and arrival (ns), cell area (um2), power (mW) at the constraint.

    None: not stated. `met` is False for a constraint that the design missed.
    """

    constraint_ns: float
    arrival_ns: float | None
    area_um2: float
    power_mw: float | None
    met: bool = True

    @property
    def energy_pj(self) -> float:
        """Energy per cycle. Raises InputError without a power."""
        if self.power_mw is None:
            raise InputError(f"The report at {self.constraint_ns:g} ns has no power, so it has no energy.")
        return self.power_mw * self.constraint_ns


# Every report, slowest constraint first.
REPORTS: dict[str, tuple[CommittedReport, ...]] = {
    "MAC, PE": (
        CommittedReport(2.0, 1.91, 1287.7, 0.224),
        CommittedReport(1.667, 1.61, 1449.4, 0.280),
        CommittedReport(1.5, 1.45, 1579.8, 0.320, met=False),
        CommittedReport(1.3, 1.45, 1648.6, 0.370, met=False),
    ),
    "OPT1, PE": (
        CommittedReport(1.5, None, 1203.9, 0.413),
        CommittedReport(1.3, None, 1236.7, 0.477),
        CommittedReport(1.2, None, 1347.7, 0.539),
        CommittedReport(1.15, None, 1397.8, 0.569),
        CommittedReport(1.11, 1.06, 1498.7, 0.554),
    ),
    "MAC, output-stationary 16x16": (CommittedReport(6.5, 6.44, 376_683, 27.6),),
    "OPT1, output-stationary 16x16": (
        CommittedReport(5.0, 4.87, 324_494, 31.7),
        CommittedReport(4.0, 3.94, 326_586, 38.6),
        CommittedReport(3.1, 3.04, 362_483, 56.4),
    ),
    "MAC, weight-stationary 16x16": (CommittedReport(5.5, 5.44, 276_542, 19.0),),
    "OPT1, weight-stationary 16x16": (
        CommittedReport(4.5, 4.45, 288_081, 24.0),
        CommittedReport(4.0, 3.94, 315_124, 32.6),
        CommittedReport(3.5, 3.45, 299_176, 36.3),
        CommittedReport(3.3, 3.25, 311_258, 40.1),
    ),
    "MAC, 3D-cube 8x8x8": (CommittedReport(6.5, 6.44, 494_745, 33.4), CommittedReport(6.3, 6.24, 498_012, 34.1)),
    "OPT1, 3D-cube 8x8x8": (CommittedReport(4.0, 3.89, 524_725, 58.4),),
    "OPT2, 16x4": (CommittedReport(1.35, 1.30, 67_172, 22.6),),
    "OPT2, 16x8": (CommittedReport(1.35, 1.29, 126_543, 42.0),),
    "OPT2, 16x16": (CommittedReport(1.45, 1.40, 230_216, 70.9),),
    "OPT2, 16x32": (CommittedReport(1.50, 1.44, 462_717, 139.8),),
    "OPT4C, column of 32": (
        CommittedReport(1.4, 1.30, 23_671, None),
        CommittedReport(1.0, 0.95, 26_548, None),
        CommittedReport(0.8, 0.74, 29_915, None),
        CommittedReport(0.6, 0.55, 30_690, None),
        CommittedReport(0.59, 0.54, 30_878, None),
    ),
    "OPT4C, column of 16": (
        CommittedReport(1.4, 1.30, 11_789, None),
        CommittedReport(1.0, 0.95, 12_956, None),
        CommittedReport(0.58, 0.53, 15_854, None),
    ),
}
# The ratios printed beside them.
RATIOS = ("frequency", "cell area", "area efficiency", "energy per cycle")
PRINTED_RATIOS = {
    "PE": (1.52, 1.03, 1.47, 1.32),
    "output-stationary 16x16": (2.12, 0.96, 2.20, 0.97),
    "weight-stationary 16x16": (1.67, 1.13, 1.49, 1.27),
    "3D-cube 8x8x8": (1.60, 1.05, 1.52, 1.09),
}
# Multiply-accumulates per cycle, and the TOPS per mm2 and TOPS per W stated for the same reports (None: not stated).
# A serial column does one operand per element in 2.41 issue cycles, or in 2.24 when only its digits are counted.
PRINTED_DENSITY: dict[str, tuple[str, float, float, float | None]] = {
    "MAC, output-stationary": ("MAC, output-stationary 16x16", 256, 0.21, 2.9),
    "OPT1, output-stationary": ("OPT1, output-stationary 16x16", 256, 0.46, 2.9),
    "OPT2, N = 32": ("OPT2, 16x32", 512, 1.48, 4.9),
    "OPT4C, N = 32, 2.41 issue cycles": ("OPT4C, column of 32", 32 / 2.41, 1.46, None),
    "OPT4C, N = 32, 2.24 digits": ("OPT4C, column of 32", 32 / 2.24, 1.57, None),
}


def fastest(name: str) -> CommittedReport:
    """The report of the tightest constraint that was met."""
    return min((report for report in REPORTS[name] if report.met), key=lambda report: report.constraint_ns)


def committed_ratios(design: str) -> tuple[float, float, float, float]:
    """Compressed over plain accumulation, in the order of RATIOS."""
    plain, compressed = fastest(f"MAC, {design}"), fastest(f"OPT1, {design}")
    assert plain.arrival_ns is not None
    assert compressed.arrival_ns is not None
    frequency = plain.arrival_ns / compressed.arrival_ns
    area = compressed.area_um2 / plain.area_um2
    return frequency, area, frequency / area, compressed.energy_pj / plain.energy_pj


def committed_density(design: str) -> float:
    """Operations (two per multiply-accumulate) per second and area, TOPS/mm2, from area and constraint of a report."""
    name, macs, _, _ = PRINTED_DENSITY[design]
    report = fastest(name)
    return 2 * macs / (report.constraint_ns * 1e-9) / 1e12 / (report.area_um2 / 1e6)


def committed_efficiency(design: str) -> float:
    """Operations per energy, TOPS/W, at the constraint. Raises InputError for a report without a power."""
    name, macs, _, _ = PRINTED_DENSITY[design]
    return 2 * macs / fastest(name).energy_pj
