"""Processing elements, multiply-accumulate and OPT1, under every cell library here, beside published SAED32 reports.

    python benchmarks/processing_elements.py [LIBERTY ...]

Writes benchmarks/results/processing_elements.json. Further Liberty files may be named on the command line.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from bitwright.core.files import write_json
from bitwright.engine import rtl
from bitwright.engine.libraries import find_library, library_names
from bitwright.engine.power import vectorless_power
from bitwright.engine.synthesis import GateReport, synthesise
from bitwright.engine.tensor_engine import TensorEngine

ELEMENTS: dict[str, tuple[str, ...]] = {"MAC": (), "OPT1": ("opt1",)}
# Ratios OPT1 / MAC of the SAED32 synthesis reports released with the paper (32 nm educational kit, TT 0.85 V 25 C,
# Design Compiler, vectorless power at the constraint period): arrival-time frequency, cell area at the highest
# frequency, area
# efficiency, energy per cycle.
SAED32 = {"frequency": 1.52, "area": 1.03, "area_efficiency": 1.47, "energy_per_cycle": 1.32, "evidence": "published"}


def row(report: GateReport, energy_j: float) -> dict[str, object]:
    """What is kept of one element under one library."""
    return {
        "area_um2": report.area_um2, "sequential_area_um2": report.sequential_area_um2, "period_s": report.period_s,
        "best_period_s": report.best_period_s, "leakage_w": report.leakage_w, "vectorless_energy_j": energy_j,
        "recipe": report.recipe, "candidates": [asdict(candidate) for candidate in report.candidates],
    }  # fmt: skip


def main(extra: list[str]) -> None:
    table: dict[str, object] = {"SAED32": {"OPT1/MAC": SAED32}}
    tool = ""
    for name in [*library_names(), *extra]:
        library = find_library(name)
        rows, reports, energies = {}, [], []
        for short, transformations in ELEMENTS.items():
            source = rtl.generate_part(TensorEngine(16, 16, transformations), "pe")
            report = synthesise(source, "pe", library)
            power = vectorless_power(report.netlist(library), report.period_s or report.longest_path_s)
            rows[short] = row(report, power.energy_j_per_cycle)
            reports.append(report)
            energies.append(power.energy_j_per_cycle)
        mac, opt1 = reports
        assert mac.best_period_s
        assert opt1.best_period_s
        assert mac.period_s
        assert opt1.period_s
        ratios = {
            "frequency": mac.best_period_s / opt1.best_period_s,
            "area": opt1.area_um2 / mac.area_um2,
            "area_efficiency": mac.area_um2 * mac.period_s / (opt1.area_um2 * opt1.period_s),
            "energy_per_cycle": energies[1] / energies[0],
            "evidence": "synthesised",
        }
        table[library.name] = {**rows, "OPT1/MAC": ratios}
        tool = mac.tool
        print(f"{library.name:32}", *(f"{key} x{value:.2f}" for key, value in ratios.items() if key != "evidence"))
    write_json(Path(__file__).parent / "results" / "processing_elements.json", {"tool": tool, "libraries": table})


if __name__ == "__main__":
    main(sys.argv[1:])
