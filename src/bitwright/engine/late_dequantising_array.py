"""Cycles, energy and area of arrays for weight-quantised networks, and their comparison at equal area.

An output-stationary array of `rows` (m) x `columns` (n) elements, one multiply-accumulate each per cycle, groups and
tiles streaming without gaps (as `rtl.late_dequantiser` does):

    compute cycles = batch * (ceil(m / rows) * ceil(n / columns) * max(k padded to groups, drain) + start)
    memory seconds = (external reads + results written) / bandwidth;  latency = the longer of the two, per product
    energy = busy element cycles * E(busy) + idle ones * E(idle) + columns * cycles * E(dequantiser at its duty)
             + row sums + buffer reads + external traffic

Three orders of dequantisation: "late" (the element multiplies codes, a dequantiser per column works once per group,
row sums are shared), "early" (a dequantiser per column expands every weight that enters), "none" (weights of the
activations' type, their scales applied after the sum over k, outside).

Source: arXiv 2411.16158; the model is ours. Areas and energies of elements are measured by the caller from gates or
taken from a table: one source for all arrays of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bitwright.arithmetic.late_dequantisation import DequantisationWork, dequantisation_work
from bitwright.core.errors import InputError
from bitwright.core.workload import Gemm
from bitwright.engine.operand_traffic import panel_traffic

Order = Literal["late", "early", "none"]


@dataclass(frozen=True)
class PartFigures:
    """Area of a part, energy of a cycle in which it works and of one in which its inputs stand still, clock period."""

    area_um2: float
    busy_j: float = 0.0
    idle_j: float = 0.0
    period_s: float = 0.0

    def __post_init__(self) -> None:
        figures = (self.area_um2, self.busy_j, self.idle_j, self.period_s)
        if not all(0 <= figure < math.inf for figure in figures):
            raise InputError(f"Areas, energies and periods are 0 or more and finite, not {self}.")


NOTHING = PartFigures(0.0)


@dataclass(frozen=True)
class ArrayFigures:
    """An array. `weight_bits` and `activation_bits` as stored; `scale_bits` per group and column of the table (scale
    and zero point; 0 for order "none"). `dequantiser` stands on every column: its busy energy is that of a cycle in
    which it takes a value (late) or a weight (early). `row_sum` stands on every row (late). `multiplies_zero`: zero
    points are there. Raises InputError for impossible figures."""

    name: str
    order: Order
    rows: int
    columns: int
    clock_hz: float
    element: PartFigures
    dequantiser: PartFigures = NOTHING
    row_sum: PartFigures = NOTHING
    weight_bits: int = 4
    activation_bits: int = 8
    result_bits: int = 16
    scale_bits: int = 20
    group: int = 128
    zero_points: bool = True

    def __post_init__(self) -> None:
        if self.order not in ("late", "early", "none"):
            raise InputError(f"Array {self.name!r}: order is late, early or none, not {self.order!r}.")
        for what in ("rows", "columns", "weight_bits", "activation_bits", "result_bits", "group"):
            if not isinstance(getattr(self, what), int) or getattr(self, what) < 1:
                raise InputError(f"Array {self.name!r}: {what} is {getattr(self, what)!r}; expected 1 or more.")
        if not 0 < self.clock_hz < math.inf or self.scale_bits < 0 or self.element.area_um2 <= 0:
            raise InputError(f"Array {self.name!r}: clock and element area are above 0, scale bits 0 or more.")
        if self.order == "late" and self.group < 2 * self.rows:
            raise InputError(
                f"Array {self.name!r}: {self.rows} rows hand over their sums in {2 * self.rows} cycles, but a group "
                f"has {self.group}; use fewer rows or larger groups."
            )

    @property
    def column_area_um2(self) -> float:
        """A column of elements and its dequantiser."""
        return self.rows * self.element.area_um2 + self.dequantiser.area_um2

    @property
    def area_um2(self) -> float:
        """Elements, dequantisers and row sums; buffers apart."""
        return self.columns * self.column_area_um2 + self.rows * self.row_sum.area_um2


@dataclass(frozen=True)
class BufferAndMemory:
    """On-chip buffer and external memory: bytes, bits per second, joules per bit, watts drawn while running."""

    buffer_bytes: float
    bandwidth_bits_per_s: float
    buffer_j_per_bit: float = 0.0
    read_j_per_bit: float = 0.0
    write_j_per_bit: float = 0.0
    idle_w: float = 0.0

    def __post_init__(self) -> None:
        energies = (self.buffer_j_per_bit, self.read_j_per_bit, self.write_j_per_bit, self.idle_w)
        if not (self.buffer_bytes > 0 and self.bandwidth_bits_per_s > 0 and min(energies) >= 0):
            raise InputError(f"Sizes and bandwidths are above 0, energies 0 or more; not {self}.")


@dataclass(frozen=True)
class ProductCost:
    """Products on an array. Predicted. Energies in joules, traffic in bits; `work` counts operations of dequantising by
    the three ways, `table_bits` the scales and zero points among the `read_bits`."""

    compute_s: float
    memory_s: float
    latency_s: float
    utilisation: float
    element_j: float
    dequantiser_j: float
    buffer_j: float
    memory_j: float
    read_bits: float
    table_bits: float
    written_bits: float
    work: DequantisationWork

    @property
    def energy_j(self) -> float:
        """All of it."""
        return self.element_j + self.dequantiser_j + self.buffer_j + self.memory_j


def product_cost(gemm: Gemm, array: ArrayFigures, memory: BufferAndMemory) -> ProductCost:
    """The products of `gemm` (m activations rows, n outputs, k inputs, `batch` times) on the array."""
    groups = math.ceil(gemm.k / array.group)
    padded = groups * array.group if array.order == "late" else gemm.k
    row_tiles, column_tiles = math.ceil(gemm.m / array.rows), math.ceil(gemm.n / array.columns)
    drain = 2 * array.rows if array.order == "late" else array.rows
    start = array.rows + array.columns
    cycles = gemm.batch * (row_tiles * column_tiles * max(padded, drain) + start)
    slots = float(cycles) * array.rows * array.columns
    macs = gemm.batch * gemm.m * gemm.n * gemm.k
    elements = macs * array.element.busy_j + (slots - macs) * array.element.idle_j
    # values or weights that pass each dequantiser, of all its cycles
    entering = gemm.batch * row_tiles * gemm.n * gemm.k
    values = {"late": gemm.batch * gemm.m * gemm.n * groups, "early": entering, "none": 0}[array.order]
    all_cycles = float(cycles) * array.columns
    dequantising = values * array.dequantiser.busy_j + max(all_cycles - values, 0.0) * array.dequantiser.idle_j
    summed = gemm.batch * column_tiles * gemm.m * gemm.k
    dequantising += summed * array.row_sum.busy_j
    dequantising += max(float(cycles) * array.rows - summed, 0.0) * array.row_sum.idle_j
    activations, weights = panel_traffic(
        gemm, array.rows, array.columns, array.activation_bits / 8, _weight_bits(array, gemm.k) / 8, memory.buffer_bytes
    )
    read, written = 8 * (activations + weights), float(gemm.batch * gemm.m * gemm.n * array.result_bits)
    table = 8 * weights * (1 - array.weight_bits / _weight_bits(array, gemm.k))
    buffered = gemm.batch * row_tiles * gemm.n * gemm.k * _weight_bits(array, gemm.k)
    buffered += gemm.batch * column_tiles * gemm.m * gemm.k * array.activation_bits
    compute, moving = cycles / array.clock_hz, (read + written) / memory.bandwidth_bits_per_s
    latency = max(compute, moving)
    moved_j = read * memory.read_j_per_bit + written * memory.write_j_per_bit + latency * memory.idle_w
    return ProductCost(
        compute, moving, latency, macs / slots, elements, dequantising, buffered * memory.buffer_j_per_bit, moved_j,
        read, table, written, _times(dequantisation_work(gemm.m, gemm.n, gemm.k, array.group, array.zero_points), gemm),
    )  # fmt: skip


def _weight_bits(array: ArrayFigures, k: int) -> float:
    """Stored bits per weight, its share of the table included."""
    scales = 0 if array.order == "none" else array.scale_bits * math.ceil(k / array.group) / k
    return array.weight_bits + scales


def _times(work: DequantisationWork, gemm: Gemm) -> DequantisationWork:
    return DequantisationWork(*(gemm.batch * each for each in (work.classical_reused, work.classical, work.late)))


def network_cost(gemms: Sequence[Gemm], array: ArrayFigures, memory: BufferAndMemory) -> ProductCost:
    """Products one after the other. Raises InputError for none."""
    if not gemms:
        raise InputError("The cost of no products asked for.")
    costs = [product_cost(gemm, array, memory) for gemm in gemms]

    def total(name: str) -> float:
        return float(sum(getattr(cost, name) for cost in costs))

    compute = total("compute_s")
    works = [sum(getattr(cost.work, name) for cost in costs) for name in ("classical_reused", "classical", "late")]
    return ProductCost(
        compute, total("memory_s"), total("latency_s"),
        sum(cost.utilisation * cost.compute_s for cost in costs) / compute, total("element_j"), total("dequantiser_j"),
        total("buffer_j"), total("memory_j"), total("read_bits"), total("table_bits"), total("written_bits"),
        DequantisationWork(*works),
    )  # fmt: skip


def equal_area(array: ArrayFigures, area_um2: float) -> ArrayFigures:
    """`array` with as many columns as fit. Raises InputError when not even one does."""
    columns = int((area_um2 - array.rows * array.row_sum.area_um2) // array.column_area_um2)
    if columns < 1:
        raise InputError(f"One column of {array.name!r} does not fit into {area_um2:g} um2; use fewer rows.")
    return replace(array, columns=columns)


@dataclass(frozen=True)
class Comparison:
    """How many times the peer's time and energy those of an array are: the peer's over the array's."""

    speed: float
    compute: float
    memory: float
    energy: float


def compare(cost: ProductCost, peer: ProductCost) -> Comparison:
    """Speed and energy of `cost` beside `peer`, and the terms of time on their own."""
    return Comparison(
        peer.latency_s / cost.latency_s, peer.compute_s / cost.compute_s, peer.memory_s / cost.memory_s,
        peer.energy_j / cost.energy_j,
    )  # fmt: skip
