"""Small edits of nests that the transformations share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.nest import REDUCTIONS, Loop, Nest, Operation, Statement, Step, Value, loops, rewrite

SUMS = (*REDUCTIONS, Operation.ADD)
_MOST = 4096  # positions that a loop is cut into


def position_loops(nest: Nest) -> list[Loop]:
    """The loops over M and N around what one position of the array does."""
    found = [loop for loop in loops(nest.body) if loop.index in ("mp", "np")]
    return list({loop.index: loop for loop in found}.values())


def wrap_in_loops(around: Sequence[Loop], *body: Statement) -> Statement:
    inner = body
    for loop in reversed(around):
        inner = (replace(loop, body=inner),)
    if len(inner) != 1:
        raise InputError("Several steps need a loop around them.")
    return inner[0]


def all_bodies(nest: Nest) -> list[tuple[Statement, ...]]:
    return [nest.body, *(loop.body for loop in loops(nest.body))]


def replace_in_body(
    body: tuple[Statement, ...], parent: tuple[Statement, ...], at: int, new: tuple[Statement, ...],
    count: int | None = None,
) -> tuple[Statement, ...]:  # fmt: skip
    """Put `new` in place of the `count` statements of `parent` from `at` on (all of them without a count)."""
    end = len(parent) if count is None else at + count
    changed = (*parent[:at], *new, *parent[end:])
    if body == parent:
        return changed
    return tuple(
        replace(item, body=replace_in_body(item.body, parent, at, new, count)) if isinstance(item, Loop) else item
        for item in body
    )


def rename_value(body: Sequence[Statement], old: str, new: str) -> tuple[Statement, ...]:
    def change(item: Statement) -> tuple[Statement, ...]:
        if isinstance(item, Loop):
            return (item,)
        inputs, outputs = (tuple(new if name == old else name for name in part) for part in (item.inputs, item.outputs))
        return (Step(item.operation, inputs, outputs),)

    return rewrite(body, change)


def replicate_values(values: Sequence[Value], names: set[str], index: str) -> tuple[Value, ...]:
    return tuple(replace(value, per=(index, *value.per)) if value.name in names else value for value in values)


def declare(values: Sequence[Value], *new: Value) -> tuple[Value, ...]:
    known = {value.name for value in values}
    return (*values, *(value for value in new if value.name not in known))


def known_value(nest: Nest, name: str) -> str:
    if name not in nest.words:
        raise UnknownNameError(f"value of nest {nest.name!r}", name, tuple(nest.words))
    return name


def whole_number(what: str, value: str | int) -> int:
    text = str(value)
    if not text.isascii() or not text.isdecimal() or not 2 <= int(text[:9]) <= _MOST:
        raise InputError(f"The {what} is {value!r}; expected a whole number of 2 to {_MOST}.")
    return int(text)


def carries(nest: Nest, item: Statement) -> bool:
    """Whether a step reads what it writes: a running sum."""
    return isinstance(item, Step) and bool(set(item.inputs) & set(item.outputs))
