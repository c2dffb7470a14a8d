"""Networks on engines given by plain figures: time, utilisation, traffic and energy of every product, equal areas.

An engine is parallel (every element finishes `depth` multiply-accumulates per cycle) or serial (its columns issue the
non-zero digits of one operand). Products run one after the other; operators without products (norms, softmax) are the
vector unit's and cost nothing here, so a ratio of two engines is one of their products.

    parallel:  batch * tiles * (ceil(k / depth) + tile_overhead) + start_cycles; tiles = ceil(m/rows) * ceil(n/columns)
    serial:    `expected_cycles.expected_array_cycles`; columns hold rows of the encoded operand, elements of a column
               the lines of the other one; batch * that + start_cycles

Source: arXiv 2503.06342, evaluation (equal-area comparison with a systolic array; busiest, least busy, average column).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bitwright.arithmetic.encodings import get
from bitwright.core.errors import InputError
from bitwright.core.workload import Gemm, Kind, Operator, Role, Workload
from bitwright.engine.digit_profiles import OperandProfile
from bitwright.engine.expected_cycles import ExpectedCycles, expected_array_cycles
from bitwright.engine.operand_traffic import panel_traffic

Side = Literal["left", "right"]
# The profiles of the left (m, k) and right (k, n) operand of an operator's product of the given index.
OperandStatistics = Callable[[Operator, int], tuple[OperandProfile, OperandProfile]]


@dataclass(frozen=True)
class EngineFigures:
    """An engine as figures, wherever they come from (synthesis, a publication).

    parallel: `rows` (M) x `columns` (N) elements of `depth` multiply-accumulates. serial: `columns` columns, each with
    `rows` elements and `lanes` digit streams; `encoding`, `bits`, `group`, `block` and `pass_overhead` as in
    `engine.serial_cycles`. `element_area_um2` is one element (OPT4E: the group of four with its state),
    `column_area_um2` what a column shares (encoders, sparse encoders); one adder of `adder_area_um2` serves
    `elements_per_adder` elements (0: no adders). Energies are per clock cycle of one element or column, busy or not.
    `tile_overhead` cycles per tile, `start_cycles` per product. `packs_batch`: rows of different products of a batch
    may share the columns of a tile, which needs columns that fetch their other operand themselves, as serial ones do.
    Raises InputError for figures outside their range.
    """

    name: str
    kind: Literal["parallel", "serial"]
    rows: int
    columns: int
    clock_hz: float
    element_area_um2: float
    element_energy_j: float = 0.0
    column_area_um2: float = 0.0
    column_energy_j: float = 0.0
    adder_area_um2: float = 0.0
    elements_per_adder: int = 0
    depth: int = 1
    lanes: int = 1
    encoding: str = "ent"
    bits: int = 8
    group: int = 4
    block: int | None = None
    pass_overhead: float = 0.0
    tile_overhead: float = 0.0
    start_cycles: float = 0.0
    packs_batch: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("parallel", "serial"):
            raise InputError(f"Engine {self.name!r}: kind is 'parallel' or 'serial', not {self.kind!r}.")
        if self.kind == "parallel" and (self.packs_batch or self.lanes != 1):
            raise InputError(f"Engine {self.name!r}: lanes and packs_batch are for serial engines.")
        for what in ("rows", "columns", "depth", "lanes", "group", "bits"):
            if not isinstance(getattr(self, what), int) or getattr(self, what) < 1:
                raise InputError(f"Engine {self.name!r}: {what} is {getattr(self, what)!r}; expected 1 or more.")
        for what in ("clock_hz", "element_area_um2"):
            if not 0 < getattr(self, what) < math.inf:
                raise InputError(f"Engine {self.name!r}: {what} is {getattr(self, what)!r}; expected above 0.")
        for what in (
            "element_energy_j", "column_area_um2", "column_energy_j", "adder_area_um2", "elements_per_adder",
            "pass_overhead", "tile_overhead", "start_cycles",
        ):  # fmt: skip
            if not 0 <= getattr(self, what) < math.inf:
                raise InputError(f"Engine {self.name!r}: {what} is {getattr(self, what)!r}; expected 0 or more.")
        get(self.encoding).digit_count(self.bits)

    @property
    def elements(self) -> int:
        """Elements of the array."""
        return self.rows * self.columns

    @property
    def adders(self) -> int:
        """Shared adders."""
        return -(-self.elements // self.elements_per_adder) if self.elements_per_adder else 0

    @property
    def area_um2(self) -> float:
        """Elements, what columns share, and adders."""
        shared = self.columns * self.column_area_um2 + self.adders * self.adder_area_um2
        return self.elements * self.element_area_um2 + shared

    @property
    def energy_j_per_cycle(self) -> float:
        """Energy of the whole array in one cycle."""
        return self.elements * self.element_energy_j + self.columns * self.column_energy_j


@dataclass(frozen=True)
class Memories:
    """What feeds the array. The buffer holds a resident panel in one half, streams in the other; 0 J: not charged."""

    buffer_bytes: float = 2**20
    bandwidth_bytes_per_s: float = math.inf
    buffer_energy_j_per_byte: float = 0.0
    memory_energy_j_per_byte: float = 0.0

    def __post_init__(self) -> None:
        energies = self.buffer_energy_j_per_byte, self.memory_energy_j_per_byte
        if not (self.buffer_bytes > 0 and self.bandwidth_bytes_per_s > 0 and min(energies) >= 0):
            raise InputError(f"Sizes and bandwidths of memories are above 0, energies 0 or more; not {self}.")


@dataclass(frozen=True)
class ProductCost:
    """All `batch` products of one kind of an operator. Predicted.

    `encoded` is the operand whose digits are issued ("" on a parallel engine). `utilisation`: busy share of all slots
    of the elements (parallel: useful multiply-accumulates; serial: see `ExpectedCycles`). `sync_utilisation`: average
    over slowest column (1 when parallel). The three column figures are in cycles. `latency_s`: the longer of
    computing and moving `memory_bytes`.
    """

    name: str
    kind: Kind
    gemm: Gemm
    encoded: str
    issue_cycles: float
    cycles: float
    utilisation: float
    sync_utilisation: float
    busiest_column: float
    least_busy_column: float
    average_column: float
    latency_s: float
    buffer_read_bytes: float
    buffer_write_bytes: float
    memory_bytes: float
    energy_j: float


@dataclass(frozen=True)
class NetworkCost:
    """A workload on an engine, product by product."""

    workload: str
    engine: EngineFigures
    products: tuple[ProductCost, ...]

    def total(self, figure: str) -> float:
        """Sum of a figure of `ProductCost` over all products."""
        return float(sum(getattr(product, figure) for product in self.products))

    @property
    def latency_s(self) -> float:
        """Seconds for all products."""
        return self.total("latency_s")

    @property
    def cycles(self) -> float:
        """Cycles of the array, waiting for memory not counted."""
        return self.total("cycles")

    @property
    def energy_j(self) -> float:
        """Array, buffer and memory."""
        return self.total("energy_j")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all products."""
        return sum(product.gemm.macs for product in self.products)

    @property
    def utilisation(self) -> float:
        """Mean utilisation, weighted by cycles."""
        return sum(product.utilisation * product.cycles for product in self.products) / self.cycles


def same_statistics(left: OperandProfile, right: OperandProfile | None = None) -> OperandStatistics:
    """The same profiles for every product; `right` defaults to `left`."""
    pair = (left, right or left)
    return lambda operator, index: pair


def choose_operand(
    engine: EngineFigures, gemm: Gemm, left: OperandProfile, right: OperandProfile
) -> tuple[Side, ExpectedCycles, int]:
    """The operand of `gemm` to encode on a serial engine: fewer expected cycles, the right one (weights) on a tie.

    Returns the side, the expected cycles of one round, and the number of rounds (1 when the batch is packed into the
    columns). Raises InputError for profiles of another encoding, width or group than the engine's.
    """
    found: dict[Side, tuple[float, ExpectedCycles, int]] = {}
    sides: tuple[tuple[Side, OperandProfile, int, int], ...] = (
        ("right", right, gemm.n, gemm.m), ("left", left, gemm.m, gemm.n)
    )  # fmt: skip
    for side, profile, encoded, other in sides:
        if (profile.encoding, profile.bits, profile.group) != (engine.encoding, engine.bits, engine.group):
            raise InputError(
                f"Profile {profile.origin!r} is {profile.encoding}, {profile.bits} bits, groups of {profile.group}; "
                f"engine {engine.name!r} needs {engine.encoding}, {engine.bits} bits, groups of {engine.group}."
            )
        rounds, lines = (1, gemm.batch * encoded) if engine.packs_batch else (gemm.batch, encoded)
        expected = expected_array_cycles(
            profile, lines, other, gemm.k, engine.columns, engine.rows, engine.lanes, engine.block,
            engine.pass_overhead, engine.tile_overhead,
        )  # fmt: skip
        found[side] = (rounds * (expected.cycles + engine.start_cycles), expected, rounds)
    best: Side = "left" if found["left"][0] < found["right"][0] else "right"
    return best, found[best][1], found[best][2]


def network_cost(
    workload: Workload, engine: EngineFigures, statistics: OperandStatistics | None = None,
    memories: Memories | None = None,
) -> NetworkCost:  # fmt: skip
    """Every product of `workload` on `engine`.

    A serial engine needs `statistics`; `memories` default to a buffer of 1 MiB and memory that never stalls.
    Raises InputError for a workload without products, a serial engine without statistics, and profiles that do not fit.
    """
    if engine.kind == "serial" and statistics is None:
        raise InputError(f"Engine {engine.name!r} is serial: its cycles need the operands' digit statistics.")
    costs: list[ProductCost] = []
    memo: dict[tuple[object, ...], ProductCost] = {}
    for operator in workload:
        for index, gemm in enumerate(operator.gemms()):
            profiles = statistics(operator, index) if statistics and engine.kind == "serial" else None
            role = operator.inputs[1].role if len(operator.inputs) > 1 else Role.ACTIVATION
            shared = operator.attributes.get("heads_per_kv_head", 1) if operator.kind is Kind.ATTENTION else 1
            from_memory = not (operator.kind is Kind.ATTENTION and index)
            key = (gemm, profiles, role, shared, from_memory, operator.kind)
            if key not in memo:
                memo[key] = _product_cost(
                    operator, gemm, engine, profiles, memories or Memories(), role is Role.WEIGHT, from_memory, shared
                )
            name = operator.name if operator.kind is not Kind.ATTENTION else f"{operator.name}[{index}]"
            costs.append(replace(memo[key], name=name))
    if not costs:
        raise InputError(f"Workload {workload.name!r} has no matrix products.")
    return NetworkCost(workload.name, engine, tuple(costs))


def _product_cost(
    operator: Operator, gemm: Gemm, engine: EngineFigures, profiles: tuple[OperandProfile, OperandProfile] | None,
    memories: Memories, right_is_weight: bool, left_from_memory: bool, right_shared_by: int,
) -> ProductCost:  # fmt: skip
    plain = engine.bits / 8
    coded = get(engine.encoding).code_bits(engine.bits) / 8
    left, right, results = (gemm.batch * size for size in (gemm.m * gemm.k, gemm.k * gemm.n, gemm.m * gemm.n))
    stored_left = stored_right = plain
    if profiles is None:
        row_tiles, column_tiles = -(-gemm.m // engine.rows), -(-gemm.n // engine.columns)
        per_tile = -(-gemm.k // engine.depth) + engine.tile_overhead
        cycles = gemm.batch * (row_tiles * column_tiles * per_tile + engine.start_cycles)
        utilisation = gemm.macs / (cycles * engine.elements * engine.depth)
        side, issue, sync, columns = "", 1.0, 1.0, (cycles, cycles, cycles)
        read = (left * column_tiles + right * row_tiles) * plain
        tile = engine.rows, engine.columns
    else:
        side, expected, rounds = choose_operand(engine, gemm, *profiles)
        profile = profiles[0] if side == "left" else profiles[1]
        cycles = rounds * (expected.cycles + engine.start_cycles)
        utilisation = expected.utilisation * rounds * expected.cycles / cycles
        issue, sync = profile.issue_cycles, expected.sync_utilisation
        columns = (
            rounds * expected.slowest_column, rounds * expected.fastest_column, rounds * expected.average_column
        )  # fmt: skip
        tile = (engine.columns, engine.rows) if side == "left" else (engine.rows, engine.columns)
        encoded, lines = (left, gemm.n) if side == "left" else (right, gemm.m)
        # Codes are read once per tile; of the other operand an element reads one value per digit it is issued.
        read = encoded * -(-lines // engine.rows) * coded + gemm.macs * profile.digits * plain
        if side == "right" and right_is_weight:
            stored_right = coded  # weights are encoded beforehand
    memory_left, memory_right = panel_traffic(gemm, *tile, stored_left, stored_right, memories.buffer_bytes)
    moved = memory_left * left_from_memory + memory_right / right_shared_by
    if operator.kind is not Kind.ATTENTION or not left_from_memory:
        moved += results * plain
    energy = cycles * engine.energy_j_per_cycle + (read + results * plain) * memories.buffer_energy_j_per_byte
    return ProductCost(
        operator.name, operator.kind, gemm, side, issue, cycles, utilisation, sync, *columns,
        max(cycles / engine.clock_hz, moved / memories.bandwidth_bytes_per_s), read, results * plain, moved,
        energy + moved * memories.memory_energy_j_per_byte,
    )  # fmt: skip


def equal_area(engine: EngineFigures, baseline: EngineFigures) -> EngineFigures:
    """`engine` with as many columns as fit into the area of `baseline`, encoders and adders charged.

    Raises InputError when not even one column fits.
    """
    budget = baseline.area_um2
    column = replace(engine, columns=1)
    columns = int(budget // (column.rows * engine.element_area_um2 + engine.column_area_um2))
    while columns and replace(engine, columns=columns).area_um2 > budget:
        columns -= 1
    if not columns:
        raise InputError(
            f"One column of {engine.name!r} takes {column.area_um2:g} um2, more than all of {baseline.name!r} "
            f"({budget:g} um2); use fewer rows or a larger baseline."
        )
    return replace(engine, columns=columns)


def speed_up(cost: NetworkCost, baseline: NetworkCost) -> float:
    """How many times faster `cost` is than `baseline`. Raises InputError when they are of different workloads."""
    if cost.workload != baseline.workload or cost.macs != baseline.macs:
        raise InputError(f"{cost.workload!r} and {baseline.workload!r} are different work; compare the same workload.")
    return baseline.latency_s / cost.latency_s


def mean_utilisation(products: Sequence[ProductCost]) -> float:
    """Utilisation of some products, weighted by cycles. Raises InputError for none."""
    if not products:
        raise InputError("Mean utilisation of no products asked for.")
    return sum(product.utilisation * product.cycles for product in products) / sum(each.cycles for each in products)
