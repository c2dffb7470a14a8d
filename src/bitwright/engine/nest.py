"""Loop nests with a bit-weight dimension: the one description that every interpreter of the engine floor reads.

A matrix product is loops over M, N and K around a body of primitives; the digits of one operand add a fourth
dimension, the bit weight BW. A loop is temporal (`for`) or spatial (`par`); a temporal loop may visit only the
positions whose digit is not zero (`sparse`). The body is data: `walk` goes through it with a table of primitives, once
on numpy words (`engine.evaluate`) and once on hardware signals (`engine.rtl`). `engine.notation` reads and writes nests
as text, `engine.transformations` rewrites them, `engine.legality` checks them.

Source: Exploring the Performance Improvement of Tensor Processing Engines through Transformation in the Bit-weight
Dimension of MACs, HPCA 2025, arXiv 2503.06342, sections on the notation and its primitives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import product
from typing import Any

from bitwright.core.errors import InputError

DATAFLOWS = ("os", "ws", "cube", "tree", "matrix2d")
DIMENSIONS = ("M", "N", "K", "BW")


class Operation(StrEnum):
    """Primitives: exact functions on integers modulo 2^bits of their outputs, and hardware components."""

    CLEAR = "clear"  # -> zero
    ENCODE = "encode"  # operand -> digit of the current bit weight
    # multiplicand, digit -> their product (a partial product); unsigned: plus 2^(bits-1); with a second output: a word
    # and the 1 still to be added to it where the digit is negative
    MAP = "map"
    MULTIPLY = "multiply"  # two operands -> their product, its structure left to the synthesis tool
    SHIFT = "shift"  # word -> word * radix^bw; word, increment -> the same, its increment still at weight one
    HALF_REDUCE = "half_reduce"  # any number of words -> carry-save pair, no carry chain
    ADD = "add"  # words -> their sum, one carry-propagate addition
    ACCUMULATE = "accumulate"  # state, words -> state, one carry-propagate addition per step
    REGISTER = "register"  # words -> the same words one cycle later
    UNBIAS = "unbias"  # word -> word minus what the same steps give for b = 0 (undoes unsigned partial products)
    SYNC = "sync"  # wait until all positions of the array have finished a block of K


REDUCTIONS = (Operation.HALF_REDUCE, Operation.ACCUMULATE)


@dataclass(frozen=True)
class Value:
    """A word of `bits` bits, replicated by the loops `per`; `state` words are registers that live across steps."""

    name: str
    bits: int
    per: tuple[str, ...] = ()
    state: bool = False
    signed: bool = True


@dataclass(frozen=True)
class Step:
    """One primitive. Inside a loop that a value is replicated over, its name means one element; outside, all."""

    operation: Operation
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """`extent` iterations over a part of `dimension` (M, N, K or BW); None: as many as the operands need.

    Iteration i stands for position i * `stride` of the dimension. `sparse` names the digits whose non-zero positions
    the loop visits (temporal loops only).
    """

    index: str
    dimension: str
    extent: int | None
    spatial: bool
    body: tuple[Statement, ...]
    stride: int = 1
    sparse: str | None = None


Statement = Loop | Step


@dataclass(frozen=True)
class Nest:
    """C[m, n] = sum over k of A[m, k] * B[k, n] as a nest over `values`, among them the operands `a` and `b`.

    `dataflow` is how operands and results move (os, ws, cube, tree, matrix2d); `encoding` is the digit encoding of `a`
    (None when no bit weight is visible) and `radix` its radix; `product` names what MULTIPLY computes when the operands
    are codes of other number formats (`engine.format_products`), None for integers; `result` names the value that holds
    C. Raises InputError for undeclared names; the rules a nest must follow are those of `engine.legality.check`.
    """

    name: str
    dataflow: str
    values: tuple[Value, ...]
    body: tuple[Statement, ...]
    result: str
    encoding: str | None = None
    radix: int = 2
    product: str | None = None
    words: Mapping[str, Value] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "body", tuple(self.body))
        object.__setattr__(self, "words", {value.name: value for value in self.values})
        if len(self.words) < len(self.values):
            names = [value.name for value in self.values]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"Nest {self.name!r} declares {twice!r} twice.")
        for step in steps(self.body):
            for name in (*step.inputs, *step.outputs):
                if name not in self.words:
                    raise InputError(f"Nest {self.name!r}: {step.operation} names {name!r}, which is not declared.")

    @property
    def states(self) -> tuple[Value, ...]:
        """The state words."""
        return tuple(value for value in self.values if value.state)

    def loop(self, index: str) -> Loop:
        """The first loop with this index. Raises InputError when there is none."""
        for loop in loops(self.body):
            if loop.index == index:
                return loop
        known = ", ".join(dict.fromkeys(loop.index for loop in loops(self.body)))
        raise InputError(f"Nest {self.name!r} has no loop {index!r}; it has {known}.")

    def has_loop(self, index: str) -> bool:
        """Whether some loop has this index."""
        return any(loop.index == index for loop in loops(self.body))

    def extent(self, index: str, default: int = 1) -> int:
        """Iterations of the loop `index`, `default` when there is no such loop or it has no fixed extent."""
        found = next((loop for loop in loops(self.body) if loop.index == index), None)
        return found.extent if found and found.extent else default

    def producer(self, name: str) -> Step:
        """The last step that makes a value (a cleared state has another one). Raises InputError for operands."""
        for step in reversed(list(steps(self.body))):
            if name in step.outputs:
                return step
        raise InputError(f"Nest {self.name!r}: no step makes {name!r}.")


def loops(body: Sequence[Statement]) -> Iterator[Loop]:
    """All loops of a body, outer before inner."""
    for statement in body:
        if isinstance(statement, Loop):
            yield statement
            yield from loops(statement.body)


def steps(body: Sequence[Statement]) -> Iterator[Step]:
    """All primitives of a body, in order."""
    for statement in body:
        if isinstance(statement, Step):
            yield statement
        else:
            yield from steps(statement.body)


def placed_steps(body: Sequence[Statement], outside: tuple[Loop, ...] = ()) -> Iterator[tuple[Step, tuple[Loop, ...]]]:
    """All primitives of a body with the loops around each, outermost first."""
    for statement in body:
        if isinstance(statement, Step):
            yield statement, outside
        else:
            yield from placed_steps(statement.body, (*outside, statement))


def rewrite(body: Sequence[Statement], change: Callable[[Statement], Sequence[Statement]]) -> tuple[Statement, ...]:
    """Replace every statement, inner ones first, by what `change` returns for it; empty loops vanish."""
    result: list[Statement] = []
    for statement in body:
        if isinstance(statement, Loop):
            inner = rewrite(statement.body, change)
            if inner:
                result.extend(change(replace(statement, body=inner)))
        else:
            result.extend(change(statement))
    return tuple(result)


# A primitive takes the input words, the current bit-weight index and the declared outputs; it returns their words.
Primitive = Callable[[Sequence[Any], int, Sequence[Value]], Sequence[Any]]
Words = dict[tuple[str, tuple[int, ...]], Any]
LoopHandler = Callable[[Loop, Mapping[str, Any]], None]
Reader = Callable[["Nest", str, Words, Mapping[str, Any]], list[Any]]


def position(value: Value, indices: Mapping[str, Any]) -> tuple[int, ...]:
    """Key of one element of a replicated value."""
    return tuple(indices[index] for index in value.per)


def read(nest: Nest, name: str, words: Words, indices: Mapping[str, Any]) -> list[Any]:
    """The element of a value at `indices`; all of its elements over loops that are not open."""
    value = nest.words[name]
    if all(index in indices for index in value.per):
        return [words[name, position(value, indices)]]
    places = ((indices[index],) if index in indices else range(nest.extent(index)) for index in value.per)
    return [words[name, key] for key in product(*places) if (name, key) in words]


def walk(
    nest: Nest, body: Sequence[Statement], words: Words, primitives: Mapping[Operation, Primitive],
    indices: Mapping[str, Any] | None = None, other_loop: LoopHandler | None = None, reader: Reader = read,
) -> None:  # fmt: skip
    """Carry out `body` on `words` ((name, position) -> word), which it updates.

    Spatial loops over BW and K are unrolled; `other_loop` handles the rest (without it they raise InputError).
    `reader` finds the inputs of a step.
    """
    indices = indices or {}
    for statement in body:
        if isinstance(statement, Loop):
            if statement.spatial and statement.dimension in ("BW", "K") and statement.extent is not None:
                for index in range(statement.extent):
                    inner = {**indices, statement.index: index}
                    walk(nest, statement.body, words, primitives, inner, other_loop, reader)
            elif other_loop is None:
                raise InputError(f"Nest {nest.name!r}: loop {statement.index!r} inside the array is not spatial.")
            else:
                other_loop(statement, indices)
            continue
        inputs = [word for name in statement.inputs for word in reader(nest, name, words, indices)]
        declared = [nest.words[name] for name in statement.outputs]
        outputs = primitives[statement.operation](inputs, indices.get("bw", 0), declared)
        for value, word in zip(declared, outputs, strict=True):
            words[value.name, position(value, indices)] = word


def reduce_to_two(words: Sequence[Any], full_adder: Callable[[Any, Any, Any], tuple[Any, Any]]) -> list[Any]:
    """Compress words to at most two, level by level, by rows of full adders (a Wallace tree of 3-2 compressors)."""
    level = list(words)
    while len(level) > 2:
        triples = len(level) // 3
        compressed: list[Any] = []
        for index in range(triples):
            compressed.extend(full_adder(*level[3 * index : 3 * index + 3]))
        level = compressed + level[3 * triples :]
    return level
