"""What a study finds: plain records of figures, each a `Quantity` with its evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitwright.core.quantity import Quantity
from bitwright.core.timeline import Schedule
from bitwright.engine.mapping import OperatorOnEngine


@dataclass(frozen=True)
class Quality:
    """Perplexity of the model in one format, executed."""

    format: str
    perplexity: Quantity
    tokens: int
    execution: str


@dataclass(frozen=True)
class LayerDigits:
    """Mean non-zero digits per value of one layer's integer operands, by encoding, measured on the real tensors."""

    layer: str
    weights: Mapping[str, float]
    activations: Mapping[str, float]


@dataclass(frozen=True)
class Gates:
    """One engine in one cell library."""

    engine: str
    library: str
    formats: str
    element_area: Quantity
    array_area: Quantity
    element_max_frequency: Quantity
    max_frequency: Quantity
    peak: Quantity
    density: Quantity
    leakage: Quantity
    recipe: str
    critical_path: str
    areas: Mapping[str, Quantity]
    verilog: str
    checks: tuple[str, ...]


@dataclass(frozen=True)
class Phase:
    """One phase of the workload on one engine in one cell library."""

    engine: str
    library: str
    phase: str
    formats: str
    tokens: int
    cycles: Quantity
    utilisation: Quantity
    time: Quantity
    tokens_per_second: Quantity
    array_energy_per_mac: Quantity
    memory_traffic: Quantity
    buffer_traffic: Quantity
    energy_per_token: Quantity
    energies: Mapping[str, Quantity]
    operators: tuple[OperatorOnEngine, ...] = field(repr=False)
    schedule: Schedule = field(repr=False)


@dataclass(frozen=True)
class StudyResult:
    """Everything a report shows."""

    title: str
    inputs: Mapping[str, Any]
    workloads: Mapping[str, Mapping[str, Quantity]]
    quality: tuple[Quality, ...]
    digits: tuple[LayerDigits, ...]
    digit_histograms: Mapping[str, Mapping[str, tuple[float, ...]]]
    gates: tuple[Gates, ...]
    phases: tuple[Phase, ...]
    roofline: Mapping[str, float]
    notes: tuple[str, ...]
    versions: Mapping[str, str]


def to_json(value: Any) -> Any:
    """Records as JSON values; schedules are left out (they are written as a trace)."""
    if isinstance(value, Quantity):
        return value.to_json()
    if isinstance(value, Schedule):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = {item.name: to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {name: entry for name, entry in pairs.items() if name != "schedule"}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    return value
