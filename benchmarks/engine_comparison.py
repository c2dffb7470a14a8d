"""All architectures and engines against their best honest baseline, per cell library.

    python benchmarks/engine_comparison.py [LIBRARY ...]

Writes benchmarks/results/engine_comparison.json: area and energy per multiply-accumulate, period, and both efficiencies
over the best baseline of the architecture (the best in that figure, so two different ones where they differ).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bitwright.engine.engine_gates import EngineGates
from bitwright.reproduce.tensor_engine_variants import ARCHITECTURES, Architecture, best, measured

RESULT = Path(__file__).parent / "results" / "engine_comparison.json"


def row(gates: EngineGates) -> dict[str, float]:
    """The figures of one engine."""
    return {
        "area_um2_per_mac_per_cycle": gates.area_um2 / gates.macs_per_cycle,
        "period_ns": gates.period_s * 1e9,
        "energy_pj_per_mac": gates.energy_j_per_mac * 1e12,
        "area_period_um2_ns_per_mac": 1e9 / gates.area_efficiency,
    }


def compare(architecture: Architecture, library: str) -> dict[str, Any]:
    """Every engine of one architecture in one library, with its ratios to the best baselines."""
    found = {kind: measured(architecture, library, kind) for kind in ("baselines", "transformed", "serial")}
    fastest = best(found["baselines"], "area_efficiency")
    frugal = best(found["baselines"], "energy_j_per_mac")
    result: dict[str, Any] = {"best baselines": {"area": fastest[0], "energy": frugal[0]}}
    for kind, engines in found.items():
        result[kind] = {}
        for name, gates in engines.items():
            area = gates.area_efficiency / fastest[1].area_efficiency
            energy = frugal[1].energy_j_per_mac / gates.energy_j_per_mac
            result[kind][name] = {**row(gates), "area_efficiency_ratio": area, "energy_efficiency_ratio": energy}
            print(f"{library:16} {architecture.name:22} {kind:12} {name:62} x{area:.2f} area  x{energy:.2f} energy")
    return result


if __name__ == "__main__":
    libraries = sys.argv[1:] or ["predictive-28nm", "osu018"]
    data = {library: {each.name: compare(each, library) for each in ARCHITECTURES} for library in libraries}
    RESULT.write_text(
        json.dumps({"evidence": "synthesised areas and clocks, simulated activity", **data}, indent=1) + "\n"
    )
