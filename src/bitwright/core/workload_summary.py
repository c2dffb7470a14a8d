"""A workload in a few rows: work and traffic by kind of operator, and the whole as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bitwright.core.workload import Kind, Tensor, Workload


@dataclass(frozen=True)
class KindSummary:
    """All operators of one kind. `macs_share` and `bytes_share` are fractions of the whole workload."""

    kind: Kind
    count: int
    macs: int
    flops: float
    bytes: float
    macs_share: float
    bytes_share: float


def summarise(workload: Workload) -> list[KindSummary]:
    """One row per kind that occurs, most bytes first; the sums over rows are those of the workload."""
    groups: dict[Kind, list[Any]] = {}
    for operator in workload:
        groups.setdefault(operator.kind, []).append(operator)
    macs, traffic = workload.macs, workload.bytes
    rows = []
    for kind, operators in groups.items():
        kind_macs, kind_bytes = sum(each.macs for each in operators), sum(each.bytes for each in operators)
        rows.append(KindSummary(
            kind, len(operators), kind_macs, sum(each.flops for each in operators), kind_bytes,
            kind_macs / macs if macs else 0.0, kind_bytes / traffic if traffic else 0.0,
        ))  # fmt: skip
    return sorted(rows, key=lambda row: -row.bytes)


def to_json(workload: Workload) -> dict[str, Any]:
    """The workload as JSON-ready data: totals, rows by kind, every operator with its tensors, edges and notes."""

    def tensor(each: Tensor, loops: Any) -> dict[str, Any]:
        return {"name": each.name, "axes": [dict(axis) for axis in each.axes], "format": each.format,
                "role": str(each.role), "elements": each.elements(loops)}  # fmt: skip

    operators = [
        {
            "name": each.name, "kind": str(each.kind), "target": each.target, "loops": dict(each.loops),
            "macs": each.macs, "flops": each.flops, "bytes_read": each.bytes_read,
            "bytes_written": each.bytes_written, "density": each.density, "attributes": dict(each.attributes),
            "inputs": [tensor(one, each.loops) for one in each.inputs],
            "outputs": [tensor(one, each.loops) for one in each.outputs],
        }
        for each in workload
    ]  # fmt: skip
    return {
        "name": workload.name, "macs": workload.macs, "flops": workload.flops, "bytes": workload.bytes,
        "parameters": workload.parameters, "notes": list(workload.notes),
        "kinds": [{**asdict(row), "kind": str(row.kind)} for row in summarise(workload)],
        "operators": operators, "edges": [list(edge) for edge in workload.edges()],
    }  # fmt: skip
