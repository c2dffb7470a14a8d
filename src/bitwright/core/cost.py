"""Roofline cost of operators on a device, with tile and wave quantisation and launch overhead. Evidence: predicted.

An operator takes its launch overhead plus the longer of its compute time and its memory time (Williams et al.,
Roofline, CACM 2009). Memory time is compulsory traffic over main-memory bandwidth (the measured sustained one when the
machine file has it). Compute time of a matrix product counts whole tiles in whole waves over the cores, as described in
NVIDIA's "Matrix Multiplication Background User's Guide" (tile and wave quantisation):

    waves = ceil(batch * ceil(m / tile_m) * ceil(n / tile_n) / cores)
    time  = waves * tile_m * tile_n * ceil(k / tile_k) * tile_k * 2 / (rate / cores)

Where the machine file states the last-level cache's bandwidth, smaller tiles (halved up to three times each way)
compete with the given one, each bounded by the operands it re-reads from that cache; the fastest is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from bitwright.core.errors import InputError
from bitwright.core.machine import Device
from bitwright.core.quantity import Evidence
from bitwright.core.workload import FORMAT_BITS, Gemm, Kind, Operator

# The next wider format that represents every value of a format, for devices that lack the format itself.
_WIDER: Mapping[str, str] = MappingProxyType({
    "int2": "int4", "int4": "int8", "int6": "int8", "uint4": "int8", "uint8": "int16", "bool": "int8", "int8": "int16",
    "int16": "int32", "int32": "fp64", "int64": "fp64", "fp8": "fp16", "fp16": "fp32", "bf16": "fp32", "tf32": "fp32",
    "fp32": "fp64",
})  # fmt: skip

_PRODUCTS = (Kind.MATMUL, Kind.CONVOLUTION, Kind.ATTENTION)


@dataclass(frozen=True)
class OperatorCost:
    """Predicted cost of one operator on one device.

    `format` is the number format it is computed in, wider than the tensors' own where the device lacks that.
    `utilisation` is useful operations over the peak rate times `time_s`. `memory_energy_j` is None when the machine
    file gives no energy per byte; `energy_limit_j` is thermal design power times time, an upper bound, None without a
    power.
    """

    name: str
    kind: Kind
    time_s: float
    compute_s: float
    memory_s: float
    overhead_s: float
    bound: str  # "compute", "memory" or "overhead"
    utilisation: float
    format: str
    memory_energy_j: float | None
    energy_limit_j: float | None
    evidence: Evidence = Evidence.PREDICTED


@dataclass(frozen=True)
class WorkloadCost:
    """Predicted cost of operators run one after the other."""

    operators: tuple[OperatorCost, ...]

    @property
    def time_s(self) -> float:
        """Total time."""
        return sum(cost.time_s for cost in self.operators)

    @property
    def memory_energy_j(self) -> float | None:
        """Energy of main-memory traffic; None when the machine file gives none."""
        energies = [cost.memory_energy_j for cost in self.operators if cost.memory_energy_j is not None]
        return sum(energies) if len(energies) == len(self.operators) else None

    def time_by_kind(self) -> dict[Kind, float]:
        """Seconds by kind of operator, longest first."""
        times: dict[Kind, float] = {}
        for cost in self.operators:
            times[cost.kind] = times.get(cost.kind, 0.0) + cost.time_s
        return dict(sorted(times.items(), key=lambda item: -item[1]))

    def time_by_bound(self) -> dict[str, float]:
        """Seconds by what bounds the operators."""
        times: dict[str, float] = {}
        for cost in self.operators:
            times[cost.bound] = times.get(cost.bound, 0.0) + cost.time_s
        return times


def compute_format(operator: Operator) -> str:
    """The number format an operator is computed in: its widest non-index input, floating point before integer.

    Block formats (q4_0, mxfp4, ...) are expanded to the format of the other operand; alone, they count as fp32.
    """
    formats = [tensor.format for tensor in operator.inputs if tensor.role != "index"] or [
        tensor.format for tensor in operator.outputs
    ]
    plain = [name for name in formats if name in FORMAT_BITS and not name.startswith(("q", "complex"))]
    floats = [name for name in plain if name.startswith(("fp", "bf", "tf"))]
    choice = floats or plain
    return max(choice, key=lambda name: FORMAT_BITS[name]) if choice else "fp32"


def _rate(device: Device, name: str, matrix: bool) -> tuple[float, str] | None:
    """Operations per second and the format they are done in: the format itself or the next wider one there is."""
    wanted: str | None = name
    while wanted is not None:
        units = (device.compute.matrix, device.compute.vector) if matrix else (device.compute.vector,)
        for unit in units:
            if wanted in unit:
                return unit[wanted].value, wanted
        wanted = _WIDER.get(wanted)
    return None


def _required_rate(device: Device, name: str, matrix: bool, operator: Operator) -> tuple[float, str]:
    found = _rate(device, name, matrix)
    if found is None and not matrix:
        found = _rate(device, name, True)
    if found is None:
        known = sorted({*device.compute.matrix, *device.compute.vector})
        raise InputError(
            f"Operator {operator.name!r} is computed in {name}, which {device.title or 'the device'} has no rate for, "
            f"nor for a wider format. It has: {', '.join(known) or 'none'}. Add the rate to the machine file."
        )
    return found


def _tiles(device: Device) -> list[tuple[int, int, int]]:
    if device.tile is None or device.cores is None:
        return []
    m, n, k = (int(size.value) for size in (device.tile.m, device.tile.n, device.tile.k))
    if _cache_bandwidth(device) is None:
        return [(m, n, k)]
    return [(m >> i, n >> j, k) for i in range(4) for j in range(4) if m >> i >= 16 and n >> j >= 16]


def _cache_bandwidth(device: Device) -> float | None:
    """Bandwidth of the last cache before main memory, in B/s, when the machine file states it."""
    caches = [memory for memory in list(device.memories.values())[:-1] if memory.per == "device"]
    return caches[-1].bandwidth.value if caches and caches[-1].bandwidth is not None else None


def tiled_time(
    gemms: Sequence[Gemm], rates: Sequence[float], operand_bytes: Sequence[float], device: Device
) -> np.ndarray:
    """Seconds of matrix products on a device with tiles and cores (see the module's equations).

    `rates` in operations per second and `operand_bytes` (bytes of one element of both operands, averaged) have one
    entry per product. Returns an array of shape (products,). Without tiles: work over rate.
    """
    shape = np.array([(g.batch, g.m, g.n, g.k, g.density) for g in gemms], dtype=float).reshape(-1, 5)
    batch, m, n, k, density = shape.T
    rate, size = np.asarray(rates, dtype=float), np.asarray(operand_bytes, dtype=float)
    tiles = _tiles(device)
    if not tiles or device.cores is None:
        return np.asarray(2 * batch * m * n * k * density / rate)
    cores, cache = device.cores.value, _cache_bandwidth(device)
    best = np.full(len(shape), np.inf)
    for tile_m, tile_n, tile_k in tiles:
        count = np.ceil(batch * np.ceil(m / tile_m) * np.ceil(n / tile_n) * density)
        depth = np.ceil(k / tile_k) * tile_k
        time = np.ceil(count / cores) * tile_m * tile_n * depth * 2 * cores / rate
        if cache is not None:
            time = np.maximum(time, count * (tile_m + tile_n) * depth * size / cache)
        best = np.minimum(best, time)
    return best


def evaluate(operators: Iterable[Operator], device: Device, *, launch_overhead_s: float | None = None) -> WorkloadCost:
    """Roofline cost of every operator (a `Workload` is iterable) on `device`, one after the other.

    `launch_overhead_s` replaces the machine file's launch overhead (0 where that gives none). Collectives have no cost
    on one device and are refused; `core.collectives` costs them. Raises InputError for them, for a device without a
    main-memory bandwidth, and for a number format the device cannot compute.
    """
    listed = list(operators)
    memory = device.main_memory
    figure = memory.sustained or memory.bandwidth
    if figure is None or figure.value <= 0:
        raise InputError(
            f"{device.title or 'The device'}: its main memory has no bandwidth; add it to the machine file."
        )
    overhead = launch_overhead_s
    if overhead is None:
        overhead = device.launch_overhead.value if device.launch_overhead else 0.0

    peak, formats = np.zeros(len(listed)), [""] * len(listed)
    compute = np.zeros(len(listed))
    flops, read, written = np.zeros(len(listed)), np.zeros(len(listed)), np.zeros(len(listed))
    gemms: list[Gemm] = []
    owners: list[int] = []
    sizes: list[float] = []
    for index, operator in enumerate(listed):
        if operator.kind is Kind.COLLECTIVE:
            raise InputError(
                f"Operator {operator.name!r} is a collective; its cost depends on the links (core.collectives)."
            )
        product = operator.kind in _PRODUCTS
        work = operator.flops * (operator.density if operator.kind is Kind.ATTENTION else 1.0)
        flops[index], read[index], written[index] = work, operator.bytes_read, operator.bytes_written
        name = compute_format(operator)
        if work == 0:
            peak[index], formats[index] = np.inf, name
            continue
        peak[index], formats[index] = _required_rate(device, name, product, operator)
        if product:
            found = operator.gemms()
            gemms.extend(found)
            owners.extend([index] * len(found))
            sizes.extend([FORMAT_BITS[formats[index]] / 8] * len(found))
        else:
            compute[index] = work / peak[index]
    if gemms:
        owner = np.array(owners)
        times = tiled_time(gemms, peak[owner], sizes, device)
        # A product too thin for the tiles of the matrix unit (a depthwise convolution) runs on the vector unit.
        for position, index in enumerate(owners):
            vector = _rate(device, formats[index], False)
            if vector is not None:
                gemm = gemms[position]
                times[position] = min(times[position], 2 * gemm.macs * gemm.density / vector[0])
        np.add.at(compute, owner, times)

    transfer = (read + written) / figure.value
    time = overhead + np.maximum(compute, transfer)
    bounds = np.where(
        overhead > np.maximum(compute, transfer), "overhead", np.where(compute >= transfer, "compute", "memory")
    )
    useful = np.divide(flops, peak * time, out=np.zeros(len(listed)), where=time > 0)
    energies: list[float | None] = [None] * len(listed)
    if memory.read_energy is not None and memory.write_energy is not None:
        energies = list((read * memory.read_energy.value + written * memory.write_energy.value).tolist())
    power = device.power.value if device.power is not None else None
    costs = []
    for i, operator in enumerate(listed):
        limit = None if power is None else power * float(time[i])
        costs.append(OperatorCost(
            operator.name, operator.kind, float(time[i]), float(compute[i]), float(transfer[i]), overhead,
            str(bounds[i]), float(useful[i]), formats[i], energies[i], limit,
        ))  # fmt: skip
    return WorkloadCost(tuple(costs))


def roofline(operator: Operator, device: Device, *, launch_overhead_s: float | None = None) -> OperatorCost:
    """Roofline cost of one operator; see `evaluate`."""
    return evaluate([operator], device, launch_overhead_s=launch_overhead_s).operators[0]
