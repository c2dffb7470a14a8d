"""Loop nests with a bit-weight dimension: the one description that every interpreter of the engine floor reads.

A matrix product is loops over M, N and K around a body of primitives; the digits of one operand add a fourth
dimension, the bit weight BW. A loop is temporal (`for`) or spatial (`par`). The body is data: `walk` goes through it
with a table of primitives, once on numpy words (`engine.evaluate`) and once on hardware signals (`engine.rtl`).

Source: Exploring the Performance Improvement of Tensor Processing Engines through Transformation in the Bit-weight
Dimension of MACs, HPCA 2025, arXiv 2503.06342, sections on the notation and its primitives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bitwright.core.errors import InputError


class Operation(StrEnum):
    """Primitives: exact functions on integers modulo 2^bits of their outputs, and hardware components."""

    ENCODE = "encode"  # operand -> digit of the current bit weight
    MAP = "map"  # multiplicand, digit -> their product (a partial product)
    MULTIPLY = "multiply"  # two operands -> their product, its structure left to the synthesis tool
    SHIFT = "shift"  # word -> word * radix^bw
    HALF_REDUCE = "half_reduce"  # any number of words -> carry-save pair, no carry chain
    ADD = "add"  # words -> their sum, one carry-propagate addition
    ACCUMULATE = "accumulate"  # state, word -> state, one carry-propagate addition per step


@dataclass(frozen=True)
class Value:
    """A signed word of `bits` bits, replicated by the loop `per`; `state` words are registers, zero at first."""

    name: str
    bits: int
    per: str = ""
    state: bool = False


@dataclass(frozen=True)
class Step:
    """One primitive. Inside the loop a value is replicated over, its name means one element; outside, all of them."""

    operation: Operation
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """`extent` iterations over a part of `dimension` (M, N, K or BW); None: what the operands leave (temporal only)."""

    index: str
    dimension: str
    extent: int | None
    spatial: bool
    body: tuple[Statement, ...]


Statement = Loop | Step


@dataclass(frozen=True)
class Nest:
    """C[m, n] = sum over k of A[m, k] * B[k, n] as a nest over `values`, among them the operands `a` and `b`.

    `encoding` is the digit encoding of `a` (None when no bit weight is visible) and `radix` its radix; `result` names
    the value that holds C. Raises InputError for undeclared names, values assigned twice outside their loops, and
    carry-save pairs read at a greater width than their own (a pair means s + c modulo 2^bits only).
    """

    name: str
    values: tuple[Value, ...]
    body: tuple[Statement, ...]
    result: str
    encoding: str | None = None
    radix: int = 2
    words: Mapping[str, Value] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", {value.name: value for value in self.values})
        pairs: dict[str, int] = {}
        for step in steps(self.body):
            for name in (*step.inputs, *step.outputs):
                if name not in self.words:
                    raise InputError(f"Nest {self.name!r}: {step.operation} names {name!r}, which is not declared.")
            if step.operation is Operation.HALF_REDUCE:
                pairs.update({name: self.words[name].bits for name in step.outputs})
        for step in steps(self.body):
            for name in step.inputs:
                if name in pairs and any(self.words[out].bits > pairs[name] for out in step.outputs):
                    raise InputError(
                        f"Nest {self.name!r}: {step.operation} reads {name!r}, one word of a carry-save pair of "
                        f"{pairs[name]} bits, at a greater width; add the pair first, or keep it wider."
                    )

    @property
    def states(self) -> tuple[Value, ...]:
        """The state registers of one position of the array."""
        return tuple(value for value in self.values if value.state)

    def loop(self, index: str) -> Loop:
        """The first loop with this index. Raises InputError when there is none."""
        for loop in _loops(self.body):
            if loop.index == index:
                return loop
        known = ", ".join(loop.index for loop in _loops(self.body))
        raise InputError(f"Nest {self.name!r} has no loop {index!r}; it has {known}.")

    def each_step(self) -> tuple[Statement, ...]:
        """What one position of the array does per step of K: the body of the innermost M or N loop inside K."""
        return _innermost(self.loop("kt").body)

    def after_last_step(self) -> tuple[Statement, ...]:
        """What happens to the state of one position once K is exhausted; empty when the state is the result."""
        parent = next(loop for loop in _loops(self.body) if any(_is_k(item) for item in loop.body))
        position = next(i for i, item in enumerate(parent.body) if _is_k(item))
        return _innermost(parent.body[position + 1 :])


def _is_k(statement: Statement) -> bool:
    return isinstance(statement, Loop) and statement.index == "kt"


def _innermost(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    while len(body) == 1 and isinstance(body[0], Loop) and body[0].dimension in ("M", "N"):
        body = body[0].body
    return body


def _loops(body: Sequence[Statement]) -> Iterator[Loop]:
    for statement in body:
        if isinstance(statement, Loop):
            yield statement
            yield from _loops(statement.body)


def steps(body: Sequence[Statement]) -> Iterator[Step]:
    """All primitives of a body, in order."""
    for statement in body:
        if isinstance(statement, Step):
            yield statement
        else:
            yield from steps(statement.body)


# A primitive takes the input words, the current bit-weight index and the declared outputs; it returns their words.
Primitive = Callable[[Sequence[Any], int, Sequence[Value]], Sequence[Any]]


def walk(
    nest: Nest, body: Sequence[Statement], words: dict[str, Any], primitives: Mapping[Operation, Primitive]
) -> None:
    """Carry out `body` on `words` (name -> word; for a replicated value, index -> word), which it updates.

    Loops over BW are unrolled; loops over M, N and K are the caller's, who decides what one position holds.
    """
    _walk(nest, body, words, primitives, {})


def _walk(
    nest: Nest, body: Sequence[Statement], words: dict[str, Any], primitives: Mapping[Operation, Primitive],
    indices: dict[str, int],
) -> None:  # fmt: skip
    for statement in body:
        if isinstance(statement, Loop):
            if statement.extent is None or statement.dimension != "BW":
                raise InputError(f"Nest {nest.name!r}: loop {statement.index!r} inside the array is not over BW.")
            for index in range(statement.extent):
                _walk(nest, statement.body, words, primitives, {**indices, statement.index: index})
            continue
        inputs: list[Any] = []
        for name in statement.inputs:
            per = nest.words[name].per
            if per and per not in indices:
                inputs.extend(words[name][index] for index in sorted(words[name]))
            else:
                inputs.append(words[name][indices[per]] if per else words[name])
        declared = [nest.words[name] for name in statement.outputs]
        outputs = primitives[statement.operation](inputs, indices.get("bw", 0), declared)
        for name, word in zip(statement.outputs, outputs, strict=True):
            per = nest.words[name].per
            if per:
                words.setdefault(name, {})[indices[per]] = word
            else:
                words[name] = word


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


def pretty(nest: Nest) -> str:
    """The nest as text, one line per loop and primitive."""
    a, b, result = nest.words["a"], nest.words["b"], nest.words[nest.result]
    lines = [f"# {nest.name}: int{a.bits} x int{b.bits} -> int{result.bits}"]
    if nest.encoding:
        lines[0] += f", digits of a: {nest.encoding}, radix {nest.radix}"
    lines += [f"state {value.name}: {value.bits} bits" for value in nest.states]
    return "\n".join(lines + list(_lines(nest, nest.body, 0, ()))) + "\n"


def _lines(nest: Nest, body: Sequence[Statement], depth: int, open_loops: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * depth

    def show(name: str) -> str:
        per = nest.words[name].per
        return f"{name}[{per if per in open_loops else '*'}]" if per else name

    for statement in body:
        if isinstance(statement, Loop):
            extent = statement.extent if statement.extent is not None else _rest(nest, statement)
            yield f"{indent}{'par' if statement.spatial else 'for'} {statement.index} in {extent}:"
            yield from _lines(nest, statement.body, depth + 1, (*open_loops, statement.index))
            continue
        inputs = ", ".join(map(show, statement.inputs))
        if statement.operation is Operation.SHIFT:
            inputs += f", {nest.radix}^bw"
        outputs = ", ".join(f"{show(name)}:{nest.words[name].bits}" for name in statement.outputs)
        yield f"{indent}{outputs} = {statement.operation}({inputs})"


def _rest(nest: Nest, loop: Loop) -> str:
    inner = [other.extent for other in _loops(loop.body) if other.dimension == loop.dimension and other.spatial]
    return f"{loop.dimension}/{inner[0]}" if inner else loop.dimension
