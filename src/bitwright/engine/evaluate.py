"""Exact evaluation of a nest on integers, and the cycle-by-cycle operation of the array that executes it.

Words are int64 arrays holding the signed reading of their low `bits` bits; every primitive wraps its outputs, so all
arithmetic is modulo 2^bits as in hardware. Carry-save pairs are kept as two words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.nest import Nest, Operation, Primitive, Value, reduce_to_two, walk
from bitwright.engine.systolic import SystolicArray, cycles

Words = NDArray[np.int64]
_CHUNK = 1 << 18  # result positions evaluated at a time, so that all words of the body stay in a few tens of MiB


def wrap(word: Any, bits: int) -> Words:
    """The signed reading of the low `bits` bits."""
    if bits >= 64:
        return np.asarray(word, dtype=np.int64)
    sign = np.int64(1 << (bits - 1))
    return np.asarray(((word & np.int64((1 << bits) - 1)) ^ sign) - sign)


def _full_adder(x: Words, y: Words, z: Words) -> tuple[Words, Words]:
    return x ^ y ^ z, ((x & y) | (x & z) | (y & z)) << np.int64(1)


@cache
def _digit_table(encoding: str, bits: int) -> NDArray[np.int64]:
    """Digits of every `bits`-bit integer, (2^bits, digits), the most negative integer first."""
    values = np.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=np.int64)
    return np.asarray(encodings.get(encoding).digits(values, bits), dtype=np.int64)


def primitives(nest: Nest) -> Mapping[Operation, Primitive]:
    """The primitives of a nest as functions of int64 words."""
    a_bits = nest.words["a"].bits

    def encode(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Words]:
        table = _digit_table(str(nest.encoding), a_bits)
        return [table[words[0] + (1 << (a_bits - 1)), weight]]

    def product(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Words]:
        return [wrap(words[0] * words[1], out[0].bits)]

    def shift(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Words]:
        return [wrap(words[0] * np.int64(nest.radix**weight), out[0].bits)]

    def half_reduce(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Words]:
        pair = [*reduce_to_two(words, _full_adder), np.int64(0)][:2]
        return [wrap(word, value.bits) for word, value in zip(pair, out, strict=True)]

    def add(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Words]:
        total = words[0]
        for word in words[1:]:
            total = total + word
        return [wrap(total, out[0].bits)]

    return {
        Operation.ENCODE: encode, Operation.MAP: product, Operation.MULTIPLY: product, Operation.SHIFT: shift,
        Operation.HALF_REDUCE: half_reduce, Operation.ADD: add, Operation.ACCUMULATE: add,
    }  # fmt: skip


def evaluate(array: SystolicArray, a: ArrayLike, b: ArrayLike) -> Words:
    """C = A @ B modulo 2^accumulator_bits by the primitives of the array's nest; (m, k), (k, n) -> (m, n) int64.

    Operands are zero-padded to whole tiles as on the array. Raises InputError for shapes that do not fit, empty
    operands, and values outside the operand width.
    """
    a, b = operands(array, a, b)
    nest = array.nest
    table = primitives(nest)
    m, n = a.shape[0], b.shape[1]
    a = _padded(a, 0, array.rows)
    b = _padded(b, 1, array.columns)
    result = np.empty((a.shape[0], b.shape[1]), np.int64)
    rows = max(1, _CHUNK // result.shape[1])
    for start in range(0, result.shape[0], rows):
        part = a[start : start + rows]
        shape = (part.shape[0], result.shape[1])
        words: dict[str, Any] = {state.name: np.zeros(shape, np.int64) for state in nest.states}
        for k in range(a.shape[1]):
            words["a"], words["b"] = part[:, k, np.newaxis], b[np.newaxis, k, :]
            walk(nest, nest.each_step(), words, table)
        walk(nest, nest.after_last_step(), words, table)
        result[start : start + rows] = words[nest.result]
    return result[:m, :n]


@dataclass(frozen=True)
class Trace:
    """What every processing element sees at its input ports, cycle by cycle, and what leaves the array.

    `inputs`: port name (`a_in`, `b_in`, `drain_in`, `<state>_in`) -> int64 (cycles, rows, columns), signed readings.
    `result`: (m, n). `cycles`: through the cycle the last result stands at the output ports.
    """

    inputs: Mapping[str, Words]
    result: Words
    cycles: int


def operand_streams(array: SystolicArray, a: ArrayLike, b: ArrayLike) -> Mapping[str, Words]:
    """The input ports of every processing element for A @ B, per cycle: name -> (cycles, rows, columns).

    Meant for one or a few tiles: memory is cycles * rows * columns * 8 bytes per port.
    """
    return operate(array, a, b).inputs


def operate(array: SystolicArray, a: ArrayLike, b: ArrayLike) -> Trace:
    """Run A @ B on the output-stationary array register by register, tile after tile (row of tiles by row of tiles).

    The schedule is that of `engine.rtl`: A skewed by rows, B by columns; after the last step the states of a column
    move south, one row per cycle, zeros following, while the next tile enters at the north. Errors as `evaluate`.
    """
    if array.dataflow != "os":
        raise InputError(f"Only output-stationary arrays can be operated cycle by cycle, not {array.dataflow!r}.")
    a, b = operands(array, a, b)
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    rows, columns, nest = array.rows, array.columns, array.nest
    total = int(cycles(array, m, n, k))
    west, north, drain = _edges(array, a, b, total)
    at_row, at_column = np.arange(rows), np.arange(columns)
    ports = {"a_in": np.zeros((total, rows, columns), np.int64)}
    for name in ("b_in", "drain_in", *(f"{state.name}_in" for state in nest.states)):
        ports[name] = np.zeros_like(ports["a_in"])
    for column in at_column:
        ports["a_in"][column:, :, column] = west[: total - column]
        ports["drain_in"][column:, :, column] = drain[: total - column]
    for row in at_row:
        ports["b_in"][row:, row, :] = north[: total - row]
    table = primitives(nest)
    state = {value.name: np.zeros((rows, columns), np.int64) for value in nest.states}
    southern = {name: np.zeros((total, columns), np.int64) for name in state}
    held = {name: np.zeros((rows, columns), np.int64) for name in ("a_in", "b_in", "drain_in")}
    for cycle in range(total):
        for name, word in state.items():
            ports[f"{name}_in"][cycle, 1:] = word[:-1]
            southern[name][cycle] = word[-1]
        words: dict[str, Any] = {**state, "a": held["a_in"], "b": held["b_in"]}
        walk(nest, nest.each_step(), words, table)
        draining = held["drain_in"].astype(bool)
        state = {name: np.where(draining, ports[f"{name}_in"][cycle], words[name]) for name in state}
        held = {name: ports[name][cycle] for name in held}
    leaving: dict[str, Any] = dict(southern)
    walk(nest, nest.after_last_step(), leaving, table)
    return Trace(ports, _collect(array, leaving[nest.result], m, n, k), total)


def _edges(array: SystolicArray, a: Words, b: Words, total: int) -> tuple[Words, Words, Words]:
    """Operands and drain signal at the edges after the skew: (total, rows), (total, columns), (total, rows)."""
    k, period = a.shape[1], a.shape[1] + array.rows
    a, b = _padded(a, 0, array.rows), _padded(b, 1, array.columns)
    west = np.zeros((total, array.rows), np.int64)
    north = np.zeros((total, array.columns), np.int64)
    drain = np.zeros((total, array.rows), np.int64)
    for tile, (top, left) in enumerate(_tiles(array, a.shape[0], b.shape[1])):
        start = tile * period
        for row in range(array.rows):
            west[start + row : start + row + k, row] = a[top + row]
            first = start + k - 1 + array.rows
            drain[first : first + row + 1, row] = 1
        for column in range(array.columns):
            north[start + column : start + column + k, column] = b[:, left + column]
    return west, north, drain


def _collect(array: SystolicArray, leaving: Words, m: int, n: int, k: int) -> Words:
    """Results by position from what the southern edge shows per cycle, (cycles, columns) -> (m, n)."""
    whole = np.zeros((-(-m // array.rows) * array.rows, -(-n // array.columns) * array.columns), np.int64)
    for tile, (top, left) in enumerate(_tiles(array, *whole.shape)):
        for column in range(array.columns):
            first = tile * (k + array.rows) + k + array.rows + column
            rows = leaving[first : first + array.rows, column]
            whole[top : top + array.rows, left + column] = rows[::-1]
    return whole[:m, :n]


def _tiles(array: SystolicArray, m: int, n: int) -> list[tuple[int, int]]:
    return [(top, left) for top in range(0, m, array.rows) for left in range(0, n, array.columns)]


def operands(array: SystolicArray, a: ArrayLike, b: ArrayLike) -> tuple[Words, Words]:
    """A (m, k) and B (k, n) as int64. Raises InputError for wrong shapes, types, or values outside the widths."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or 0 in (*a.shape, *b.shape):
        raise InputError(f"Expected operands (m, k) and (k, n) with extents >= 1, got {a.shape} and {b.shape}.")
    for name, matrix, bits in (("A", a, array.a_bits), ("B", b, array.b_bits)):
        if not np.issubdtype(matrix.dtype, np.integer):
            raise InputError(f"Operand {name} holds {matrix.dtype}; expected integers (quantise first).")
        low, high = int(matrix.min()), int(matrix.max())
        if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
            raise InputError(f"Operand {name} has values from {low} to {high}; {bits} bits hold "
                             f"{-(1 << (bits - 1))} to {(1 << (bits - 1)) - 1}.")  # fmt: skip
    return a.astype(np.int64), b.astype(np.int64)


def _padded(matrix: Words, axis: int, multiple: int) -> Words:
    missing = -matrix.shape[axis] % multiple
    return np.pad(matrix, [(0, missing if index == axis else 0) for index in range(2)])
