"""A workload on a tensor engine: cycles, on-chip and off-chip traffic of every operator, and the resulting timeline.

Products run on the array; everything else runs on a vector unit of a given number of lanes. Between operators, tensors
live in external memory, except that a result goes straight on when the next operator runs on the vector unit. The
scores of attention pass the vector unit row by row and never leave the chip. Codes with a scale per group are summed
group by group, and the vector unit adds the groups.

A serial engine (opt3, opt4c, opt4e) takes as many cycles as the digits of its encoded operand need: expected cycles
from the operand statistics of every product, each encoding the operand that takes fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from bitwright.core.errors import InputError
from bitwright.core.timeline import Schedule, Timeline
from bitwright.core.workload import Gemm, Kind, Operator, Role, Workload
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.nest import loops
from bitwright.engine.network_cost import EngineFigures, OperandStatistics, choose_operand
from bitwright.engine.operand_traffic import panel_traffic
from bitwright.engine.tensor_engine import TensorEngine, buffer_accesses, cycles
from bitwright.engine.widths import check_depth

# Kinds that run on the vector unit and can take the result of the operator before them as it comes.
_FUSED = (Kind.SOFTMAX, Kind.NORMALISATION, Kind.ELEMENTWISE, Kind.REDUCTION)
_MOST_PIECES = 64
_PREFETCHED = (Role.WEIGHT, Role.KV, Role.OPTIMIZER)


@dataclass(frozen=True)
class System:
    """What surrounds the array: buffer, vector unit and external memory.

    `buffer_bytes` holds one resident panel in one half while the other half streams; `memory_bandwidth` in bytes/s.
    """

    clock_hz: float
    buffer_bytes: float
    vector_lanes: int
    memory_bandwidth: float
    memory_name: str = "memory"


@dataclass(frozen=True)
class OperatorOnEngine:
    """One operator on an engine. Cycles and buffer accesses are exact, on a serial engine expected from statistics;
    traffic follows the panel schedule.

    `busy_cycles`: cycles in which all elements would do the same work if none ever waited or idled. `encoded_cycles`:
    on a serial engine, the cycles in which the left and the right operand was the encoded one.
    """

    name: str
    kind: Kind
    array_cycles: float
    vector_cycles: int
    macs: int
    buffer_read_bytes: float
    buffer_write_bytes: float
    memory_prefetch_bytes: float  # weights and KV cache: known before the predecessor finishes
    memory_read_bytes: float  # everything read, prefetchable or not
    memory_write_bytes: float
    busy_cycles: float = 0.0
    encoded_cycles: tuple[float, float] = (0.0, 0.0)

    @property
    def memory_bytes(self) -> float:
        """External traffic in both directions."""
        return self.memory_read_bytes + self.memory_write_bytes


@dataclass(frozen=True)
class ScaleGroups:
    """How many positions of K, and how many columns of a product share the scales of its operands; None: all of them.

    The array sums codes, so a sum ends where a scale does; the vector unit multiplies it by the scales and adds it to
    those before.
    """

    k: int | None = None
    n: int | None = None

    def parts(self, gemm: Gemm) -> tuple[Gemm, ...]:
        """The products of codes that `gemm` consists of; the last group of K may be a smaller one."""
        columns = min(self.n or gemm.n, gemm.n)
        batch = gemm.batch * math.ceil(gemm.n / columns)
        whole, rest = divmod(gemm.k, min(self.k or gemm.k, gemm.k))
        parts = ((batch * whole, (gemm.k - rest) // whole), (batch, rest))
        return tuple(Gemm(count, gemm.m, columns, k, gemm.density) for count, k in parts if k)


NO_GROUPS = ScaleGroups()
Groups = Callable[[Operator, int], ScaleGroups]  # of product number i of an operator


@dataclass(frozen=True)
class ProductOnEngine:
    """All products of a batch on an engine, with the words that pass its edges and the tile (m, n) it takes at a time.

    `encoded` is the operand whose digits a serial engine issues ("" on a parallel one).
    """

    cycles: float
    busy_cycles: float
    encoded: str
    left_words: float
    right_words: float
    result_words: float
    tile: tuple[int, int]


def serial_figures(engine: TensorEngine, clock_hz: float = 1.0) -> EngineFigures:
    """What the cycle model of `engine.expected_cycles` takes of a serial engine; a column has one row of A.

    A pass costs a drain of the column's elements, a product the registers of the pipeline once, as in the RTL. Area and
    energy are not filled in. Raises InputError for a parallel engine, and one that skips digits of one operand instead
    of one digit of several.
    """
    digits = next((loop for loop in loops(engine.nest.body) if loop.sparse), None)
    if digits is None or digits.dimension != "K":
        raise InputError(
            f"{engine.nest.name}: serial cycles are known of engines that issue the non-zero digits of several k at "
            "one bit weight (opt3, opt4c, opt4e); this one does not."
        )
    tail = 3 + sum(engine.output_cycles) + engine.latency - engine.shares_encoders
    return EngineFigures(
        engine.nest.name, "serial", engine.columns, engine.rows, clock_hz, 1.0, lanes=engine.nest.extent("lane"),
        encoding=engine.encoding, bits=engine.a_bits, group=digits.extent or 1, pass_overhead=engine.columns,
        start_cycles=tail,
    )  # fmt: skip


def map_gemm(
    engine: TensorEngine, gemm: Gemm, operator: Operator | None = None, index: int = 0,
    statistics: OperandStatistics | None = None, groups: ScaleGroups = NO_GROUPS,
) -> ProductOnEngine:  # fmt: skip
    """The products of `gemm`, number `index` of `operator`, on an engine, one per group of scales.

    On a serial engine the operand that takes fewer cycles is encoded. Raises InputError for a serial engine without
    `operator` or `statistics`, with groups, and where operands have other widths than the statistics,
    IllegalTransformation for a K at which the engine's states could lose a sum.
    """
    left: float
    right: float
    check_hardware(engine)
    tile = engine.rows, engine.columns
    parts = groups.parts(gemm)
    for part in parts:
        check_depth(engine.nest, part.k)
    if not engine.serial:
        total = sum(part.batch * int(cycles(engine, part.m, part.n, part.k)) for part in parts)
        left, right, result = map(sum, zip(*(buffer_accesses(engine, part) for part in parts), strict=True))
        # sums of groups go to the vector unit, which holds the totals of a tile; only these are written
        result -= sum(part.batch * part.m * part.n for part in parts) - gemm.batch * gemm.m * gemm.n
        return ProductOnEngine(float(total), gemm.macs / engine.macs_per_cycle, "", left, right, result, tile)
    left, right, result = buffer_accesses(engine, gemm)
    if groups != NO_GROUPS:
        raise InputError(f"Engine {engine.nest.name!r} is serial: it takes operands with one scale per row.")
    if statistics is None or operator is None:
        raise InputError(
            f"Engine {engine.nest.name!r} is serial: its cycles need the digit statistics of its operands."
        )
    figures, profiles = serial_figures(engine), statistics(operator, index)
    side, expected, rounds = choose_operand(figures, gemm, *profiles)
    profile = profiles[0] if side == "left" else profiles[1]
    if side == "right":
        turned = Gemm(gemm.batch, gemm.n, gemm.m, gemm.k)
        right, left, result = buffer_accesses(engine, turned)
        tile = engine.columns, engine.rows
    # Groups of the encoded operand are read in every pass; of the other one an element reads a word per digit issued.
    per_digit = gemm.macs * profile.digits
    left, right = (left, per_digit) if side == "left" else (per_digit, right)
    streams = engine.rows * engine.columns * figures.lanes
    return ProductOnEngine(
        rounds * (expected.cycles + figures.start_cycles), gemm.macs * profile.issue_cycles / streams, side,
        left, right, result, tile,
    )  # fmt: skip


def map_operator(
    operator: Operator,
    engine: TensorEngine,
    system: System,
    passed: Set[str] = frozenset(),
    consumed: Set[str] = frozenset(),
    statistics: OperandStatistics | None = None,
    groups: Groups | None = None,
) -> OperatorOnEngine:
    """Cycles and traffic of one operator. Operators of unknown kind are charged their bytes and no cycles.

    `passed` names the inputs that an operator of the vector unit gets from its predecessor without a detour through
    memory, `consumed` the outputs that nobody reads from memory; `statistics` are needed by a serial engine, `groups`
    by operands with more than one scale per row.
    """
    gemms = operator.gemms()
    if gemms:
        return _map_products(operator, gemms, engine, system, consumed, statistics, groups)
    fused = operator.kind in _FUSED
    vector_cycles = 0
    if operator.kind is not Kind.UNKNOWN:
        vector_cycles = math.ceil(max(operator.points, _written(operator)) / system.vector_lanes)
    if operator.kind is Kind.GATHER:  # only the gathered rows move
        moved = sum(tensor.bytes(operator.loops) for tensor in operator.outputs)
        return _off_array(operator, vector_cycles, 0.0, moved, moved)
    weights = sum(tensor.bytes(operator.loops) for tensor in operator.inputs if tensor.role in _PREFETCHED)
    if fused:
        read = sum(tensor.bytes(operator.loops) for tensor in operator.inputs if tensor.name not in passed)
        return _off_array(operator, vector_cycles, weights, read, _stored(operator, consumed))
    return _off_array(operator, vector_cycles, weights, operator.bytes_read, operator.bytes_written)


def _stored(operator: Operator, consumed: Set[str]) -> float:
    return sum(tensor.bytes(operator.loops) for tensor in operator.outputs if tensor.name not in consumed)


def _written(operator: Operator) -> int:
    return sum(tensor.elements(operator.loops) for tensor in operator.outputs)


def _off_array(
    operator: Operator, vector_cycles: int, prefetch: float, read: float, written: float
) -> OperatorOnEngine:
    return OperatorOnEngine(operator.name, operator.kind, 0.0, vector_cycles, 0, 0.0, 0.0, prefetch, read, written)


def _map_products(
    operator: Operator, gemms: Sequence[Gemm], engine: TensorEngine, system: System, consumed: Set[str],
    statistics: OperandStatistics | None, groups: Groups | None,
) -> OperatorOnEngine:  # fmt: skip
    if len(operator.inputs) < 2:
        raise InputError(f"Operator {operator.name!r} is a product but names {len(operator.inputs)} input tensors.")
    attention = operator.kind is Kind.ATTENTION
    left_tensor = operator.inputs[0]
    result_bytes = operator.outputs[0].bits / 8
    array_cycles = busy_cycles = read = prefetch = buffer_read = buffer_write = 0.0
    scaled = 0  # sums of groups that the vector unit multiplies by their scales and adds
    encoded = {"left": 0.0, "right": 0.0, "": 0.0}
    for index, gemm in enumerate(gemms):
        right_tensor = operator.inputs[1 + index] if attention and len(operator.inputs) > 2 else operator.inputs[1]
        left, right = left_tensor.bits / 8, right_tensor.bits / 8
        grouped = groups(operator, index) if groups else NO_GROUPS
        product = map_gemm(engine, gemm, operator, index, statistics, grouped)
        if grouped.k:
            scaled += sum(part.batch * part.m * part.n for part in grouped.parts(gemm))
        array_cycles += product.cycles
        busy_cycles += product.busy_cycles
        encoded[product.encoded] += product.cycles
        buffer_read += product.left_words * left + product.right_words * right
        buffer_write += product.result_words * result_bytes
        left_read, right_read = panel_traffic(gemm, *product.tile, left, right, system.buffer_bytes)
        if attention:
            # The second product takes its left operand from the vector unit (softmax), not from memory, and the
            # query heads of a group share one read of their keys and values.
            left_read = left_read if index == 0 else 0.0
            right_read /= operator.attributes.get("heads_per_kv_head", 1)
        read += left_read + right_read
        prefetch += left_read * (left_tensor.role in _PREFETCHED) + right_read * (right_tensor.role in _PREFETCHED)
    read += sum(tensor.bytes(operator.loops) for tensor in operator.inputs[3 if attention else 2 :])
    written = _stored(operator, consumed)
    vector_cycles = math.ceil(scaled / system.vector_lanes)
    if attention:  # softmax between the two products: one pass for the maximum, one for exponential and sum
        vector_cycles += math.ceil(2 * gemms[0].batch * gemms[0].m * gemms[0].n / system.vector_lanes)
    return OperatorOnEngine(
        operator.name, operator.kind, array_cycles, vector_cycles, operator.macs, buffer_read, buffer_write,
        prefetch, read, written, busy_cycles, (encoded["left"], encoded["right"]),
    )  # fmt: skip


def map_workload(
    workload: Workload, engine: TensorEngine, system: System, statistics: OperandStatistics | None = None,
    groups: Groups | None = None,
) -> list[OperatorOnEngine]:  # fmt: skip
    """Every operator of a workload on an engine, in the workload's order; a serial engine needs `statistics`, operands
    with more than one scale per row their `groups`.

    A result goes straight to the next operator when that one runs on the vector unit; it is stored as well if anyone
    else reads it, or nobody does. Everything else passes through memory.
    """
    readers: dict[tuple[str, int], list[int]] = {}
    writer: dict[str, int] = {}
    for index, operator in enumerate(workload):
        for tensor in operator.inputs:
            if tensor.name in writer:
                readers.setdefault((tensor.name, writer[tensor.name]), []).append(index)
        writer.update({tensor.name: index for tensor in operator.outputs})
    mapped = []
    arriving: set[str] = set()
    operators = workload.operators
    for index, operator in enumerate(operators):
        fused_next = index + 1 < len(operators) and operators[index + 1].kind in _FUSED
        leaving = {
            tensor.name
            for tensor in operator.outputs
            if fused_next and index + 1 in readers.get((tensor.name, index), []) and tensor.role is Role.ACTIVATION
        }
        consumed = {name for name in leaving if readers[name, index] == [index + 1]}
        mapped.append(map_operator(operator, engine, system, arriving, consumed, statistics, groups))
        arriving = leaving
    return mapped


def schedule(mapped: Sequence[OperatorOnEngine], edges: Sequence[tuple[int, int]], system: System) -> Schedule:
    """Simulate the operators on three resources: array, vector unit and memory channel.

    An operator runs in pieces, each with as many bytes as half of the buffer (an operator of more than 64 such pieces
    in 64, to bound the number of tasks): while one half feeds the array, the other is loaded. Weights and cached keys
    and values are loaded as soon as a half is free, also ahead of their operator; activations once they have been
    written. Results are written back after the last piece. Where an operator has both, the vector part (softmax of
    attention) overlaps the array part of the same piece.
    """
    producers: dict[int, list[int]] = {}
    for producer, consumer in edges:
        producers.setdefault(consumer, []).append(producer)
    timeline = Timeline()
    array = timeline.resource("array")
    vector = timeline.resource("vector unit")
    memory = timeline.resource(system.memory_name)

    def move(name: str, size_bytes: float, after: list[int]) -> int:
        return timeline.task(name, size_bytes / system.memory_bandwidth, [memory], after=after, category="memory")

    written: list[list[int]] = []  # per operator: the tasks after which its results can be read
    worked: list[list[int]] = [[], []]  # per piece: the tasks that free its half of the buffer
    for index, operator in enumerate(mapped):
        inputs = [task for producer in producers.get(index, []) for task in written[producer]]
        pieces = math.ceil(operator.memory_read_bytes / (system.buffer_bytes / 2))
        pieces = min(max(pieces, 1), _MOST_PIECES)
        prefetched = operator.memory_prefetch_bytes / pieces
        dependent = (operator.memory_read_bytes - operator.memory_prefetch_bytes) / pieces
        done: list[int] = inputs
        for _ in range(pieces):
            ready = list(inputs)
            if prefetched:
                ready.append(move(f"load {operator.name}", prefetched, worked[-2]))
            if dependent > 0:
                ready.append(move(f"load {operator.name}", dependent, inputs + worked[-2]))
            tasks = [
                timeline.task(
                    operator.name,
                    count / pieces / system.clock_hz,
                    [resource],
                    after=ready,
                    category=str(operator.kind),
                )
                for count, resource in ((operator.array_cycles, array), (operator.vector_cycles, vector))
                if count
            ]
            done = tasks or ready
            worked.append(done)
        if operator.memory_write_bytes:
            done = [move(f"store {operator.name}", operator.memory_write_bytes, done)]
        written.append(done)
    return timeline.simulate()
