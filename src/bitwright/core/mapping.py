"""Loop-nest mapping of operators onto a spatial array with a memory hierarchy. Evidence: predicted.

The loops unrolled in space are given by the accelerator; those left over are split into factors and ordered in time.
For an ordering, each memory holds for each of its operands a tile: the innermost loops that fit (the representation of
Timeloop, Parashar et al., ISPASS 2019, and of ZigZag, Mei et al., IEEE TC 2021, where operands may be tiled unevenly).
All orderings are evaluated at once with numpy, each three times: tiles may fill a memory, half or an eighth of it.

Counting, for a tile of the first p loops (innermost first) below a memory:
- it is refilled once per iteration of the loops outside, skipping those next to it that do not index the operand;
- an output tile goes up at every refill and comes back down unless it is new; it goes up as an output the last time
  and as a partial sum before; tiles overlapping in a sliding window are fetched whole;
- an access costs its share of the memory's width, in whole granules, in every instance that is in use.

Latency (after Mei et al., "A Uniform Latency Model for DNN Accelerators", DATE 2022):
    cycles = compute + stall + prologue + epilogue
where compute is the product of the temporal loops. A refill may use the whole period of its tile when the memory holds
the tile twice, else the last iteration of the topmost loops that do not index it; what does not fit the window stalls.
A port stalls by what its transfers together exceed the compute time. Stalls of different ports overlap. The prologue
loads the first tiles whole before the first multiply-accumulate; the epilogue drains what the last output tile could
not write back while it was computed, and the cells of the systolic dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.core.machine import Accelerator
from bitwright.core.mapping_search import (
    Array,
    Nest,
    OrderingFigures,
    OrderingSearch,
    Positions,
    orderings,
    prepare,
    temporal_factors,
)
from bitwright.core.quantity import Evidence
from bitwright.core.workload import Kind, Operator, Tensor

Objective = Literal["latency", "energy", "edp"]
_FILLS = (1.0, 0.5, 0.125)


@dataclass(frozen=True)
class Traffic:
    """Bits read from and written to a memory for one operand, over all its instances."""

    read_bits: float
    write_bits: float
    energy_j: float


@dataclass(frozen=True)
class LoopMapping:
    """One operator mapped onto the array.

    `temporal` lists (loop, factor) innermost first; `tiles[memory][operand]` how many of them the tile in that memory
    covers; `spatial` the loop and extent unrolled along each array dimension. `repeat` counts the times the nest runs
    one after the other (groups and batches with weights of their own); all totals include it.
    """

    name: str
    latency_cycles: float
    compute_cycles: float
    stall_cycles: float
    prologue_cycles: float
    epilogue_cycles: float
    latency_s: float
    energy_j: float
    mac_energy_j: float
    traffic: Mapping[str, Mapping[str, Traffic]]
    temporal: tuple[tuple[str, int], ...]
    tiles: Mapping[str, Mapping[str, int]]
    spatial: Mapping[str, tuple[str, int]]
    spatial_utilisation: float
    utilisation: float
    repeat: int
    orderings: int
    evidence: Evidence = Evidence.PREDICTED


def _score(figures: OrderingFigures, objective: Objective) -> tuple[Array, Array]:
    """Primary and tie-breaking score."""
    if objective == "latency":
        return figures.latency, figures.energy
    if objective == "energy":
        return figures.energy, figures.latency
    return figures.latency * figures.energy, figures.latency


def map_operator(
    operator: Operator, accelerator: Accelerator, objective: Objective = "latency", *, max_factors: int = 7
) -> LoopMapping:
    """The best temporal mapping of a matrix product or convolution found on a spatial array.

    The first two inputs and the first output are mapped; a bias is not counted.

    Every order of at most `max_factors` loop factors is evaluated (7 give up to 5040). Raises InputError for other
    kinds of operators, an unknown objective, and an operator that does not fit the memories.
    """
    if objective not in ("latency", "energy", "edp"):
        raise InputError(f"Unknown objective {objective!r}; one of latency, energy, edp.")
    if not 1 <= max_factors <= 9:
        raise InputError(f"max_factors is {max_factors}; it must be between 1 and 9 (9! orders).")
    nest = prepare(operator, accelerator)
    factors = temporal_factors(nest.temporal, max_factors)
    if len(factors) > 9:
        raise InputError(f"Operator {operator.name!r} has {len(factors)} temporal loops; at most 9 can be ordered.")
    orders = orderings(factors)
    search = OrderingSearch(nest, accelerator, factors, orders)
    best: tuple[float, float] | None = None
    chosen: tuple[int, Positions, OrderingFigures] | None = None
    for fill in _FILLS:
        positions, feasible = search.allocate(fill)
        if not feasible.any():
            continue
        figures = search.evaluate(positions)
        primary, second = _score(figures, objective)
        primary = np.where(feasible, primary, np.inf)
        index = int(np.lexsort((second, primary))[0])
        score = (float(primary[index]), float(second[index]))
        if best is None or score < best:
            best, chosen = score, (index, positions, figures)
    if chosen is None:
        raise InputError(f"Operator {operator.name!r} does not fit the memories of the accelerator.")
    return _report(operator, nest, search, factors, orders, *chosen)


def _report(
    operator: Operator, nest: Nest, search: OrderingSearch, factors: list[tuple[str, int]], orders: NDArray[np.intp],
    index: int, positions: Positions, figures: OrderingFigures,
) -> LoopMapping:  # fmt: skip
    accelerator, repeat = search.accelerator, nest.repeat
    traffic: dict[str, dict[str, Traffic]] = {
        name: {
            operand: Traffic(float(figures.reads[name][operand][index]) * repeat,
                             float(figures.writes[name][operand][index]) * repeat,
                             float(figures.traffic_energy[name][operand][index]) * repeat)
            for operand in memory.operands
        }
        for name, memory in accelerator.memories.items()
    }  # fmt: skip
    latency = float(figures.latency[index]) * repeat
    used = math.prod(extent for _, extent in nest.spatial.values())
    return LoopMapping(
        name=operator.name,
        latency_cycles=latency,
        compute_cycles=search.compute * repeat,
        stall_cycles=float(figures.stall[index]) * repeat,
        prologue_cycles=float(figures.prologue[index]) * repeat,
        epilogue_cycles=float(figures.epilogue[index]) * repeat,
        latency_s=latency / accelerator.clock.value,
        energy_j=float(figures.energy[index]) * repeat,
        mac_energy_j=nest.macs * accelerator.mac_energy.value * repeat,
        traffic=traffic,
        temporal=tuple(factors[i] for i in orders[index]),
        tiles={name: {op: int(at[index]) for op, at in held.items()} for name, held in positions.items()},
        spatial=nest.spatial,
        spatial_utilisation=used / accelerator.cells,
        utilisation=nest.macs * repeat / (accelerator.cells * latency),
        repeat=repeat,
        orderings=len(orders),
    )


def map_workload(
    operators: Iterable[Operator], accelerator: Accelerator, objective: Objective = "latency", *, max_factors: int = 7
) -> tuple[list[LoopMapping], list[str]]:
    """Map every operator with products, one after the other; equal nests are searched once.

    Attention is mapped as its two products, a transposed convolution as its product. Returns the mappings and the
    names of the operators that were left out because they have no multiply-accumulates.
    Raises InputError as `map_operator` does.
    """
    found: dict[object, LoopMapping] = {}
    mappings, left_out = [], []
    for operator in operators:
        if operator.macs == 0:
            left_out.append(operator.name)
            continue
        for part in _lowered(operator):
            axes = tuple(tuple(tuple(axis.items()) for axis in tensor.axes) for tensor in (*part.inputs, *part.outputs))
            kinds = tuple((tensor.role, tensor.size) for tensor in (*part.inputs, *part.outputs))
            key = (part.kind, tuple(part.loops.items()), axes, kinds)
            if key not in found:
                found[key] = map_operator(part, accelerator, objective, max_factors=max_factors)
            mappings.append(replace(found[key], name=part.name))
    return mappings, left_out


def _lowered(operator: Operator) -> tuple[Operator, ...]:
    """The nests mapped for an operator: itself, or the products of attention and of transposed convolutions."""
    if operator.kind is not Kind.ATTENTION and not operator.attributes.get("transposed"):
        return (operator,)
    parts = []
    gemms = operator.gemms()
    labels = ("scores", "context") if operator.kind is Kind.ATTENTION else ("product",)
    for gemm, label in zip(gemms, labels, strict=True):
        tensors = (
            Tensor("left", ({"b": 1}, {"m": 1}, {"k": 1})),
            Tensor("right", ({"b": 1}, {"k": 1}, {"n": 1})),
            Tensor("out", ({"b": 1}, {"m": 1}, {"n": 1})),
        )
        loops = {"b": gemm.batch, "m": gemm.m, "n": gemm.n, "k": gemm.k}
        parts.append(Operator(f"{operator.name}.{label}", Kind.MATMUL, loops, tensors[:2], tensors[2:]))
    return tuple(parts)
