"""Exact evaluation of a nest on integers.

Words are int64 arrays holding the reading of their low `bits` bits; every primitive wraps its outputs, so all
arithmetic is modulo 2^bits as in hardware, and carry-save pairs are kept as two words. Loops over M and N are array
axes, loops over K and BW are carried out in the order of the nest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.format_products import product_unit
from bitwright.engine.iteration_space import check_iteration_space
from bitwright.engine.nest import (
    Loop,
    Nest,
    Operation,
    Primitive,
    Value,
    Words,
    loops,
    read,
    reduce_to_two,
    steps,
    walk,
)
from bitwright.engine.step_forms import check_assignments, check_forms
from bitwright.engine.widths import check_depth, largest_depth, state_values

Integers = NDArray[np.int64]
_CHUNK = 1 << 18  # result positions evaluated at a time, so that all words of the body stay in a few tens of MiB


def wrap(word: Any, bits: int, signed: bool = True) -> Integers:
    """The reading of the low `bits` bits."""
    if bits >= 64:
        return np.asarray(word, dtype=np.int64)
    mask = np.int64((1 << bits) - 1)
    if not signed:
        return np.asarray(word & mask)
    sign = np.int64(1 << (bits - 1))
    return np.asarray(((word & mask) ^ sign) - sign)


def _full_adder(x: Integers, y: Integers, z: Integers) -> tuple[Integers, Integers]:
    half = x ^ y
    return half ^ z, ((x & y) | (half & z)) << np.int64(1)


@cache
def _digit_table(encoding: str, bits: int) -> NDArray[np.int64]:
    """Digits of every `bits`-bit integer, (2^bits, digits), the most negative integer first."""
    values = np.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=np.int64)
    return np.asarray(encodings.get(encoding).digits(values, bits), dtype=np.int64)


def _primitives(nest: Nest) -> Mapping[Operation, Primitive]:
    a_bits = nest.words["a"].bits

    def wrapped(word: Any, value: Value) -> Integers:
        return wrap(word, value.bits, value.signed)

    def clear(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        return [np.zeros((1, 1), np.int64) for _ in out]

    def encode(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        table = _digit_table(str(nest.encoding), a_bits)
        return [table[words[0] + (1 << (a_bits - 1)), weight]]

    def whole_product(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        bias = 0 if out[0].signed else 1 << (out[0].bits - 1)
        found = product_unit(nest.product).values(*words) if nest.product else words[0] * words[1]
        return [wrapped(found + np.int64(bias), out[0])]

    def multiple(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        if len(out) == 1:
            return whole_product(words, weight, out)
        negative = np.asarray(words[1] < 0).astype(np.int64)
        return [*whole_product((words[0] * words[1] - negative, 1), weight, out), negative]

    def shift(words: Sequence[Any], weight: Any, out: Sequence[Value]) -> list[Integers]:
        if isinstance(weight, _Visit):  # over non-zero digits: every row of A is at a bit weight of its own
            ((at, _),) = weight.at.values()
            scale: Any = np.power(np.int64(nest.radix), at)
        else:
            scale = np.int64(nest.radix**weight)
        if len(words) == 1:
            return [wrapped(words[0] * scale, out[0])]
        return [wrapped(words[0] * scale + words[1] * (scale - 1), out[0]), words[1]]

    def half_reduce(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        pair = [*reduce_to_two(words, _full_adder), np.zeros((1, 1), np.int64)][:2]
        return [wrapped(word, value) for word, value in zip(pair, out, strict=True)]

    def add(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        total = words[0]
        for word in words[1:]:
            total = total + word
        return [wrapped(total, out[0])]

    def register(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        return list(words)

    def unbias(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        return [wrapped(words[0] - words[0][:, -1:], out[0])]  # the last column has b = 0

    def sync(words: Sequence[Any], weight: int, out: Sequence[Value]) -> list[Integers]:
        return []

    return {
        Operation.CLEAR: clear, Operation.ENCODE: encode, Operation.MAP: multiple, Operation.MULTIPLY: whole_product,
        Operation.SHIFT: shift, Operation.HALF_REDUCE: half_reduce, Operation.ADD: add, Operation.ACCUMULATE: add,
        Operation.REGISTER: register, Operation.UNBIAS: unbias, Operation.SYNC: sync,
    }  # fmt: skip


@dataclass(frozen=True)
class _Visit:
    """Where a loop over non-zero digits stands: per other position of the digits, where each row of A is, and whether
    it still has a digit, (m, 1)."""

    at: Mapping[tuple[int, ...], tuple[Integers, NDArray[np.bool_]]]
    digits: Value

    def here(self, index: str, indices: Mapping[str, Any]) -> tuple[Integers, NDArray[np.bool_]]:
        return self.at[tuple(indices[name] for name in self.digits.per if name != index)]


class _Evaluation:
    """One nest on one block of rows: its operands, padded, and its words."""

    def __init__(self, nest: Nest, a: Integers, b: Integers) -> None:
        self.nest, self.k = nest, a.shape[1]
        outer = [loop for loop in loops(nest.body) if loop.dimension == "K"]
        self.strides = {loop.index: loop.stride for loop in outer}
        missing = -self.k % max((loop.stride for loop in outer if loop.extent is None), default=1)
        self.a = np.pad(a, ((0, 0), (0, missing)))
        self.b = np.pad(b, ((0, missing), (0, 1)))  # the last column is zero: what UNBIAS takes off
        self.words: Words = {}
        self.primitives = _primitives(nest)

    def run(self) -> Integers:
        self.walk(self.nest.body, {})
        result = self.words[self.nest.result, ()]
        return np.broadcast_to(result, (self.a.shape[0], self.b.shape[1]))[:, :-1]

    def walk(self, body: Sequence[Any], indices: Mapping[str, Any]) -> None:
        walk(self.nest, body, self.words, self.primitives, indices, self.loop, self.read)

    def loop(self, loop: Loop, indices: Mapping[str, Any]) -> None:
        if loop.dimension in ("M", "N"):
            self.walk(loop.body, indices)
        elif loop.sparse:
            for visit in self.visits(loop, indices):
                self.walk(loop.body, {**indices, loop.index: visit})
        else:
            extent = loop.extent if loop.extent is not None else -(-self.k // loop.stride)
            for index in range(extent):
                self.walk(loop.body, {**indices, loop.index: index})

    def visits(self, loop: Loop, indices: Mapping[str, Any]) -> list[_Visit]:
        """The steps of a loop over non-zero digits: the j-th visits the j-th non-zero digit of every row of A."""
        digits = self.nest.words[str(loop.sparse)]
        place = digits.per.index(loop.index)
        groups: dict[tuple[int, ...], list[Integers]] = {}
        places = (
            (indices[name],) if name in indices and name != loop.index else range(self.nest.extent(name))
            for name in digits.per
        )
        for key in product(*places):
            groups.setdefault(key[:place] + key[place + 1 :], []).append(self.words[digits.name, key])
        order: dict[tuple[int, ...], tuple[Integers, Integers]] = {}
        for other, found in groups.items():
            flags = np.stack(np.broadcast_arrays(*found)) != 0
            order[other] = np.argsort(~flags, axis=0, kind="stable"), flags.sum(axis=0)
        longest = max(1, *(int(count.max()) for _, count in order.values()))
        return [
            _Visit({other: (positions[j], count > j) for other, (positions, count) in order.items()}, digits)
            for j in range(longest)
        ]

    def read(self, nest: Nest, name: str, words: Words, indices: Mapping[str, Any]) -> list[Any]:
        moving = next((index for index in nest.words[name].per if isinstance(indices.get(index), _Visit)), None)
        if name in ("a", "b"):
            return [self.operand(name, indices)]
        if moving is None:
            return read(nest, name, words, indices)
        visit: _Visit = indices[moving]
        positions, active = visit.here(moving, indices)
        choices = read(nest, name, words, {index: at for index, at in indices.items() if index != moving})
        chosen = np.take_along_axis(np.stack(np.broadcast_arrays(*choices)), positions[np.newaxis], 0)[0]
        # A row without a further digit adds nothing; its digit is zero.
        return [np.where(active, chosen, 0) if name == visit.digits.name else chosen]

    def operand(self, name: str, indices: Mapping[str, Any]) -> Integers:
        """Column k of A as (m, 1), or row k of B as (1, n); (m, n) where k differs from row to row."""
        k: Any = 0
        for index, at in indices.items():
            if index in self.strides:
                place = at.here(index, indices)[0] if isinstance(at, _Visit) else at
                k = k + place * self.strides[index]
        if isinstance(k, np.ndarray):
            return np.take_along_axis(self.a, k, 1) if name == "a" else self.b[k[:, 0]]
        return self.a[:, k, np.newaxis] if name == "a" else self.b[np.newaxis, k]


def run(nest: Nest, a: ArrayLike, b: ArrayLike, pad: bool = True, modular: bool = False) -> Integers:
    """C = A @ B by the primitives of a nest; (m, k), (k, n) -> (m, n) int64.

    K is padded with zeros to what the nest takes at a time; with `pad=False` another K raises InputError, as do shapes
    that do not fit, empty operands, values outside the operand widths, a nest that computes something else
    (`check_product`), and a sum that the result cannot hold; with `modular` the result is that sum modulo 2^bits, as
    hardware leaves it. Raises IllegalTransformation for a K at which the state of one bit weight could lose a sum
    (`widths.check_depth`).
    """
    left, right = operands(nest, a, b)
    check_product(nest)
    check_depth(nest, left.shape[1])
    if not modular:
        _check_sums(nest, left, right)
    return _run(nest, left, right, pad)


def _run(nest: Nest, left: Integers, right: Integers, pad: bool) -> Integers:
    step = _step(nest)
    if not pad and left.shape[1] % step:
        raise InputError(
            f"K = {left.shape[1]} is not a multiple of {step}, which the nest takes at a time; allow padding."
        )
    result = np.empty((left.shape[0], right.shape[1]), np.int64)
    rows = max(1, _CHUNK // (result.shape[1] * max(1, _spread(nest))))
    for start in range(0, result.shape[0], rows):
        result[start : start + rows] = _Evaluation(nest, left[start : start + rows], right).run()
    return result


def _step(nest: Nest) -> int:
    """Positions of K that one iteration of the outermost loop over K takes."""
    return max((loop.stride for loop in loops(nest.body) if loop.dimension == "K" and loop.extent is None), default=1)


def _reference(nest: Nest, a: Integers, b: Integers) -> Integers:
    """A @ B of integers, or of number-format codes by the product the nest names."""
    return product_unit(nest.product).matmul(a, b) if nest.product else a @ b


def _check_sums(nest: Nest, a: Integers, b: Integers) -> None:
    bits = nest.words[nest.result].bits
    largest = a.shape[1] << (nest.words["a"].bits + nest.words["b"].bits - 2)  # no sum of integers can exceed it
    if bits >= 64 or (nest.product is None and largest < 1 << (bits - 1)):
        return
    sums = _reference(nest, a, b)
    if (wrap(sums, bits) != sums).any():
        raise InputError(
            f"Nest {nest.name!r}: sums from {int(sums.min())} to {int(sums.max())} do not fit a result of {bits} bits. "
            "Give the accumulator more bits, split K, or pass modular=True for the result modulo 2^bits."
        )


@lru_cache(maxsize=4096)
def check_product(nest: Nest) -> None:
    """Raise InputError for a nest that does not compute A @ B modulo 2^bits of its result.

    Its loops must cover M, N, K and BW once (`iteration_space.check_iteration_space`); then it is run on the extreme
    and on random operands, over three steps of K (fewer where its states hold no more), and compared with numpy.
    """
    check_iteration_space(nest)
    check_forms(nest)
    check_assignments(nest)
    step = _step(nest)
    k = largest_depth(nest, 3 * step)
    if k < 1:
        return  # not even one product is safe: whatever K comes, `check_depth` refuses it
    if nest.product:
        k = max(step, k - k % step)  # padding is not zero in every number format
    random = np.random.default_rng(0)
    a, b = (_extremes(random, nest, name, (10, k)) for name in ("a", "b"))
    try:
        found = _run(nest, a, b.T, True)
    except (KeyError, IndexError, ValueError, TypeError) as error:  # InputError is none of these
        raise InputError(
            f"Nest {nest.name!r} cannot be carried out ({type(error).__name__}: {error}): a step reads a word where "
            "there is none, or one of another kind."
        ) from None
    wanted = wrap(_reference(nest, a, b.T), nest.words[nest.result].bits)
    if (found != wanted).any():
        row, column = np.argwhere(found != wanted)[0]
        shown = "..." * (k > 4)
        raise InputError(
            f"Nest {nest.name!r} does not compute A @ B: the row {a[row, :4].tolist()}{shown} of A and the column "
            f"{b[column, :4].tolist()}{shown} of B give {found[row, column]} instead of {wanted[row, column]}. Every "
            "product of K must be summed once, with all its bit weights, in words that hold it."
        )


def _extremes(random: np.random.Generator, nest: Nest, name: str, shape: tuple[int, int]) -> Integers:
    """Rows of operand words: all the lowest, all the highest, both in turn, and random ones."""
    half = 1 << (nest.words[name].bits - 1)
    words = getattr(product_unit(nest.product), name).words if nest.product else np.arange(-half, half)
    rows = random.choice(words, shape)
    rows[0], rows[1], rows[2] = words[0], words[-1], np.where(np.arange(shape[1]) % 2, words[0], words[-1])
    return np.asarray(rows, np.int64)


def _spread(nest: Nest) -> int:
    """Roughly how many (m, n) words a nest holds at once."""
    widest = 1
    for value in nest.values:
        if value.name in {name for step in steps(nest.body) for name in step.outputs}:
            widest = max(widest, int(np.prod([nest.extent(index) for index in value.per])))
    return widest // 4


def operands(nest: Nest, a: ArrayLike, b: ArrayLike) -> tuple[Integers, Integers]:
    """A (m, k) and B (k, n) as int64. Raises InputError for wrong shapes, types, or values outside the widths."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or 0 in (*a.shape, *b.shape):
        raise InputError(f"Expected operands (m, k) and (k, n) with extents >= 1, got {a.shape} and {b.shape}.")
    for name, matrix, bits in (("A", a, nest.words["a"].bits), ("B", b, nest.words["b"].bits)):
        if not np.issubdtype(matrix.dtype, np.integer):
            raise InputError(f"Operand {name} holds {matrix.dtype}; expected integers (quantise first).")
        low, high = int(matrix.min()), int(matrix.max())
        if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
            raise InputError(f"Operand {name} has values from {low} to {high}; {bits} bits hold "
                             f"{-(1 << (bits - 1))} to {(1 << (bits - 1)) - 1}.")  # fmt: skip
    return a.astype(np.int64), b.astype(np.int64)


def bias_per_step(nest: Nest) -> int:
    """What one step of K adds to the state that grows with K when b is zero: the bias of unsigned partial products.

    One step is one iteration of the loop kt; in a serial engine, one cycle. 0 for nests with signed partial products.
    """
    evaluation = _Evaluation(nest, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))
    for state in nest.states:
        evaluation.words[state.name, ()] = np.zeros((1, 1), np.int64)
    step = nest.loop("kt")
    evaluation.walk(step.body, {"kt": 0} if not nest.has_loop("bw") or nest.loop("bw").spatial else {"bw": 0, "kt": 0})
    growing = state_values(nest)
    made = {name for item in steps(step.body) for name in item.outputs}
    return sum(int(evaluation.words[state.name, ()][0, 0]) for state in growing if state.name in made)
