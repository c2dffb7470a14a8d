"""What a generated engine is driven with, and what every output must show in every cycle: results from exact
evaluation, times from the cycle model. So results and cycle counts are verified together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import encodings
from bitwright.engine.evaluate import Integers, run, wrap
from bitwright.engine.format_products import product_unit
from bitwright.engine.rtl import reset_cycles, top
from bitwright.engine.rtl.arithmetic import label
from bitwright.engine.rtl.elements import operands, positions
from bitwright.engine.rtl.grid import operand_port
from bitwright.engine.rtl.serial import group, lane_count
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.waveforms import Waveforms

Product = tuple[Integers, Integers]


@dataclass(frozen=True)
class Stimulus:
    """The waveforms of some matrix products, one after the other; `steps` counts the operand vectors driven: K
    positions of tiles, rows of A where B is stationary."""

    waveforms: Waveforms
    products: int
    steps: int
    cycles: int


class _Recorder:
    """Port values by cycle, written out of order; inputs are noise where nothing is driven."""

    def __init__(self, engine: TensorEngine, rng: np.random.Generator, noise: bool) -> None:
        component = top(engine)
        self.engine, self.rng, self.noise = engine, rng, noise
        self.widths = {name: len(signal) for name, signal in (*component.inputs.items(), *component.outputs.items())}
        self.driven: dict[str, dict[int, int]] = {name: {} for name in component.inputs}
        self.seen: dict[str, dict[int, int]] = {name: {} for name in component.outputs}
        self.quiet: dict[str, int] = {}
        self.end = 0

    def drive(self, port: str, cycle: int, value: int) -> None:
        self.driven[port][cycle] = int(value)

    def expect(self, port: str, cycle: int, value: int) -> None:
        self.seen[port][cycle] = int(value)
        self.end = max(self.end, cycle + 1)

    def waveforms(self, always: Sequence[str]) -> Waveforms:
        """`always`: outputs that count in every cycle, their value elsewhere in `quiet` (zero by default)."""
        inputs, expected, care = {}, {}, {}
        for name, values in self.driven.items():
            bits = self.widths[name]
            column = self.rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), self.end) if bits > 1 else (
                self.rng.integers(0, 2, self.end)
            )  # fmt: skip
            if name in self.quiet or not self.noise:
                column[:] = self.quiet.get(name, 0)
            _write(column, values)
            inputs[name] = column.astype(np.int64)
            if not self.noise and name not in self.quiet and values:
                inputs[name] = _held(inputs[name], values)
        for name, values in self.seen.items():
            column = np.full(self.end, self.quiet.get(name, 0), np.int64)
            _write(column, values)
            expected[name] = column
            if name not in always:
                mask = np.zeros(self.end, bool)
                mask[list(values)] = True
                care[name] = mask
        return Waveforms(inputs, expected, care, self.widths, reset_cycles(self.engine))


def _write(column: NDArray[np.int64], values: dict[int, int]) -> None:
    if values:
        cycles = np.fromiter(values, np.int64, len(values))
        kept = cycles < len(column)
        column[cycles[kept]] = np.fromiter(values.values(), np.int64, len(values))[kept]


def _held(column: NDArray[np.int64], values: dict[int, int]) -> NDArray[np.int64]:
    """The column with every cycle that nothing drives at the value before."""
    driven = np.zeros(len(column), np.int64)
    cycles = np.fromiter((cycle for cycle in values if cycle < len(column)), np.int64)
    driven[cycles] = cycles
    return np.asarray(column[np.maximum.accumulate(driven)])


def stimulus(
    engine: TensorEngine, products: Sequence[Product], rng: np.random.Generator, noise: bool = True
) -> Stimulus:
    """Waveforms that run the products back to back on the engine's hardware, every third one with idle cycles.

    Inputs that the engine must ignore are random; without `noise` they keep their last value, as buffers do.
    """
    record = _Recorder(engine, rng, noise)
    kind = _serial if engine.serial else _weight_stationary if engine.dataflow == "ws" else _grid
    steps, cycles, always = kind(record, products)
    return Stimulus(record.waveforms(always), len(products), steps, cycles)


def _partial_results(engine: TensorEngine, a: Integers, b: Integers) -> list[Integers]:
    """The sum after every pass, the last one the whole product; several passes go through the digits of A in order."""
    whole = run(engine.nest, a, b, modular=True)
    if engine.passes == 1:
        return [whole]
    digits = np.asarray(encodings.get(engine.encoding).digits(a, engine.a_bits), np.int64)
    weights = np.int64(engine.nest.radix) ** np.arange(digits.shape[-1])
    sums = [(digits[..., : index + 1] * weights[: index + 1]).sum(-1) @ b for index in range(engine.passes - 1)]
    return [wrap(total, engine.accumulator_bits) for total in sums] + [whole]


def _pad(matrix: Integers, rows: int, columns: int) -> Integers:
    return np.pad(matrix, ((0, -matrix.shape[0] % rows), (0, -matrix.shape[1] % columns)))


def _arrivals(rng: np.random.Generator, count: int, gaps: bool) -> Integers:
    """Cycles in which steps are driven: one after the other, or with idle cycles between."""
    return np.cumsum(1 + rng.integers(0, 2, count)) - 1 if gaps else np.arange(count)


def _grid(record: _Recorder, products: Sequence[Product]) -> tuple[int, int, Sequence[str]]:
    engine = record.engine
    rows, columns, step = engine.rows, engine.columns, engine.step
    hops = engine.dataflow == "os"
    several = engine.passes > 1
    start = total = 0
    record.quiet |= {"valid": 0, "last": 0, "ready": 1}
    for number, (a, b) in enumerate(products):
        sums = [_pad(item, rows, columns) for item in _partial_results(engine, a, b)]
        left, right = _pad(a, rows, step), _pad(b, step, columns)
        for top_row in range(0, left.shape[0], rows):
            for side in range(0, right.shape[1], columns):
                for index in range(engine.passes):
                    at = start + _arrivals(record.rng, left.shape[1] // step, number % 3 == 2)
                    for count, cycle in enumerate(at.tolist()):
                        record.drive("valid", cycle, 1)
                        record.drive("last", cycle, int(count == len(at) - 1))
                        if several:
                            record.drive("weight", cycle, index)
                        for offset in range(step):
                            k = count * step + offset
                            for row in range(rows):
                                record.drive(operand_port("a", row, offset, step), cycle, left[top_row + row, k])
                            for column in range(columns):
                                record.drive(operand_port("b", column, offset, step), cycle, right[k, side + column])
                    final = int(at[-1])
                    for cycle in range(final + 1, final + 1 + rows):
                        record.expect("ready", cycle, 0)
                        for port in ("valid", "last") if record.noise else ():  # ignored while not ready
                            record.drive(port, cycle, int(record.rng.integers(0, 2)))
                    first = final + (rows if hops else 1) + engine.latency + 1 + sum(engine.output_cycles)
                    for column in range(columns):
                        for row in range(rows):
                            cycle = first + row + (column if hops else 0)
                            place = top_row + rows - 1 - row, side + column
                            record.expect(f"result_{column}", cycle, sums[index][place])
                            valid = record.seen["result_valid"].get(cycle, 0)
                            record.expect("result_valid", cycle, valid | 1 << column)
                            if several:
                                record.drive(
                                    f"partial_{column}",
                                    cycle - engine.output_cycles[1],
                                    sums[index - 1][place] if index else 0,
                                )
                    ending = first + rows - 1 + (columns - 1 if hops else 0)
                    record.expect("done", ending, 1)
                    start = final + 1 + rows
                total += left.shape[1]
    for cycle in range(start, record.end):
        record.driven["valid"].pop(cycle, None)
    return total, record.end, ("ready", "result_valid", "done")


def _weight_stationary(record: _Recorder, products: Sequence[Product]) -> tuple[int, int, Sequence[str]]:
    engine = record.engine
    depth, columns = engine.depth, engine.columns
    record.quiet |= {"valid": 0, "first": 0, "load": 0}
    load, free, total = 0, 0, 0  # when the next tile can be loaded, when rows can follow
    ports = [(label("b", word.key)[1:], offset) for word, (_, offset) in zip(
        operands(engine)[1], positions(engine.nest, "b"), strict=True)]  # fmt: skip
    stride = engine.chain.stride if engine.chain else 1
    for number, (a, b) in enumerate(products):
        left, right = _pad(a, 1, engine.step), _pad(b, engine.step, columns)
        weighted = _weighted(engine, left)
        for side in range(0, right.shape[1], columns):
            before = np.zeros((a.shape[0], columns), np.int64)
            for index, block in product(range(engine.passes), range(0, left.shape[1], engine.step)):
                tile = right[block : block + engine.step, side : side + columns]
                part = weighted[index][:, block : block + engine.step]
                added = product_unit(engine.nest.product).matmul(part, tile) if engine.nest.product else part @ tile
                after = wrap(before + added, engine.accumulator_bits)
                for link, column, (port, offset) in product(range(depth), range(columns), ports):
                    record.drive("load", load + link, 1)
                    word = tile[offset + (depth - 1 - link) * stride, column]
                    record.drive(f"b_{column}{port}", load + link, word)
                first = max(load + depth, free)
                at = first + _arrivals(record.rng, a.shape[0], number % 3 == 2)
                at -= at[0] - first
                for row, cycle in enumerate(at.tolist()):
                    record.drive("valid", cycle, 1)
                    record.drive("first", cycle, int(row == 0))
                    if engine.passes > 1:
                        record.drive("weight", cycle, index)
                    for position in range(engine.step):
                        record.drive(operand_port("a", 0, position, engine.step), cycle, left[row, block + position])
                    for column in range(columns):
                        shown = cycle + depth + 1 + sum(engine.output_cycles) + engine.latency + column
                        needed = shown - engine.output_cycles[1]
                        if engine.passes == 1:  # it enters with the sums, at the north
                            needed = cycle + 1 + engine.latency + column
                        record.drive(f"partial_{column}", needed, before[row, column])
                        record.expect(f"result_{column}", shown, after[row, column])
                        record.expect("result_valid", shown, record.seen["result_valid"].get(shown, 0) | 1 << column)
                load, free, before = first + depth, int(at[-1]) + 1, after
                total += len(at)
    return total, record.end, ("result_valid",)


def _weighted(engine: TensorEngine, a: Integers) -> list[Integers]:
    """What every pass takes of A: its digits at one bit weight, times that weight; A itself when there is one pass."""
    if engine.passes == 1:
        return [a]
    digits = np.asarray(encodings.get(engine.encoding).digits(a, engine.a_bits), np.int64)
    return [digits[..., index] * np.int64(engine.nest.radix**index) for index in range(engine.passes)]


def _serial(record: _Recorder, products: Sequence[Product]) -> tuple[int, int, Sequence[str]]:
    engine = record.engine
    columns, size = engine.rows, engine.columns
    start = total = 0
    if not record.noise:
        record.quiet |= {f"valid_{column}_{lane}": 0 for column in range(columns) for lane in range(lane_count(engine))}
    ports = [f"ready_{column}_{lane}" for column in range(columns) for lane in range(lane_count(engine))]
    for a, b in products:
        sums = [_pad(item, columns, size) for item in _partial_results(engine, a, b)]
        left, right = _pad(a, columns, engine.step), _pad(b, engine.step, size)
        digits = np.asarray(encodings.get(engine.encoding).digits(left, engine.a_bits))
        for top_row in range(0, left.shape[0], columns):
            for side in range(0, right.shape[1], size):
                ends = []
                for column in range(columns):
                    row = top_row + column
                    part = [item[row, side : side + size] for item in sums]
                    ends.append(
                        _serial_column(
                            record, column, start, left[row], digits[row], right[:, side : side + size], part
                        )
                    )
                record.expect("synchronised", max(ends), 1)
                start = max(ends) + size
                total += left.shape[1]
    for port in ports:
        valid = port.replace("ready", "valid")
        for cycle in range(start, record.end):  # all is done: the streams are ready and get nothing
            record.drive(valid, cycle, 0)
            record.expect(port, cycle, 1)
    return total, record.end, ("result_valid", "synchronised", *ports)


def _serial_column(
    record: _Recorder, column: int, start: int, a: Integers, digits: NDArray[np.int8], b: Integers, sums: list[Integers]
) -> int:  # fmt: skip
    """Drive one row of A through its column from cycle `start` on; the cycle in which its last pass ends."""
    engine = record.engine
    members, lanes, size = group(engine), lane_count(engine), engine.columns
    registers = engine.latency - engine.shares_encoders
    end = start
    for index in range(engine.passes):
        ends = []
        for lane in range(lanes):
            cycle = start
            groups = range(lane * members, len(a), lanes * members)
            for k in groups:
                for name, value in (("valid", 1), ("last", int(k + lanes * members >= len(a)))):
                    record.drive(f"{name}_{column}_{lane}", cycle, value)
                record.drive(f"weight_{column}", cycle, index)
                record.drive(f"block_{column}", cycle, int(index == engine.passes - 1))
                record.expect(f"ready_{column}_{lane}", cycle, 1)
                for at in range(members):
                    record.drive(f"a_{column}_{lane}_{at}", cycle, a[k + at])
                places = np.flatnonzero(digits[k : k + members, index]).tolist()
                for issue, place in enumerate(places, cycle + 1):
                    record.expect(f"position_{column}_{lane}", issue, place)
                    for element in range(size):
                        record.drive(f"b_{column}_{element}_{lane}", issue + 1, b[k + place, element])
                cycle += max(1, len(places))
            ends.append(cycle)
        end = max(ends)
        for element in range(size):
            shown = end + 3 + sum(engine.output_cycles) + registers + size - 1 - element
            record.expect(f"result_{column}", shown, sums[index][element])
            record.expect("result_valid", shown, record.seen["result_valid"].get(shown, 0) | 1 << column)
            record.drive(f"partial_{column}", shown - engine.output_cycles[1], sums[index - 1][element] if index else 0)
        start = end + size
    return end
