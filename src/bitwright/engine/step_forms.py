"""The form of the steps of a nest: what each primitive takes and makes, where words may be made, and how often."""

from __future__ import annotations

from collections.abc import Sequence

from bitwright.core.errors import InputError
from bitwright.engine.nest import REDUCTIONS, Loop, Nest, Operation, Step, loops, placed_steps, steps

_MANY = 1 << 30
# Fewest and most inputs, fewest and most outputs.
_FORMS = {
    Operation.CLEAR: (0, 0, 1, _MANY), Operation.ENCODE: (1, 1, 1, 1), Operation.MAP: (2, 2, 1, 2),
    Operation.MULTIPLY: (2, 2, 1, 1), Operation.SHIFT: (1, 2, 1, 2), Operation.HALF_REDUCE: (1, _MANY, 1, 2),
    Operation.ADD: (1, _MANY, 1, 1), Operation.ACCUMULATE: (2, _MANY, 1, 1), Operation.REGISTER: (1, _MANY, 1, _MANY),
    Operation.UNBIAS: (1, 1, 1, 1), Operation.SYNC: (0, 0, 0, 0),
}  # fmt: skip


def check_forms(nest: Nest) -> None:
    """Raise InputError for a step with other inputs or outputs than its primitive has, and words over loops that are
    not open where they are made."""
    _check_values(nest)
    for step, outside in placed_steps(nest.body):
        _check_form(nest, step)
        for name in step.outputs:
            closed = [index for index in nest.words[name].per if index not in _open(outside)]
            if closed:
                raise InputError(
                    f"{_where(nest, step)}: {name!r} is kept for each {closed[0]!r}, a loop the step is not inside of."
                )


def check_assignments(nest: Nest) -> None:
    """Raise InputError for values made twice, states that something else than their running sum writes, and an encode
    of something else than the operand a."""
    makers: dict[str, Step] = {}
    for step in steps(nest.body):
        where = _where(nest, step)
        if step.operation is Operation.ENCODE and step.inputs != ("a",):
            raise InputError(f"{where}: encode takes the operand a.")
        for name in step.outputs:
            state = nest.words[name].state
            if step.operation is Operation.CLEAR and not state:
                raise InputError(f"{where}: {name!r} is cleared, so it must be declared as a state.")
            if state and step.operation is not Operation.CLEAR:
                if step.operation not in REDUCTIONS or name not in step.inputs:
                    raise InputError(f"{where}: a state is written by clear and by a running sum that reads it.")
            elif not state and makers.setdefault(name, step) is not step:
                raise InputError(f"{where} makes {name!r} a second time; give it another name.")


def _where(nest: Nest, step: Step) -> str:
    return f"Nest {nest.name!r}, `{', '.join(step.outputs)} = {step.operation}({', '.join(step.inputs)})`"


def _open(outside: Sequence[Loop]) -> set[str]:
    return {loop.index for loop in outside if loop.dimension in ("K", "BW") and loop.extent is not None}


def _check_values(nest: Nest) -> None:
    known = {loop.index: loop for loop in loops(nest.body)}
    for value in nest.values:
        if len(set(value.per)) < len(value.per):
            raise InputError(f"Nest {nest.name!r}: {value.name!r} names a loop twice.")
        for index in value.per:
            loop = known.get(index)
            if loop is None or loop.extent is None or loop.dimension not in ("K", "BW"):
                raise InputError(
                    f"Nest {nest.name!r}: {value.name!r} is kept for each {index!r}, which is no loop over bit weights "
                    "or a fixed number of positions of K."
                )
            if value.name in ("a", "b") and loop.dimension != "K":
                raise InputError(f"Nest {nest.name!r}: the operand {value.name!r} has no word per {index!r}.")
    result = nest.words.get(nest.result)
    if result is None or result.per or result.name in ("a", "b"):
        raise InputError(f"Nest {nest.name!r}: the result {nest.result!r} must be one word that a step makes.")


def _check_form(nest: Nest, step: Step) -> None:
    where = _where(nest, step)
    fewest, most, made_least, made_most = _FORMS[step.operation]
    if not fewest <= len(step.inputs) <= most or not made_least <= len(step.outputs) <= made_most:
        raise InputError(
            f"{where}: {step.operation} takes {_count(fewest, most)} and makes {_count(made_least, made_most)} word(s)."
        )
    if len(set(step.outputs)) < len(step.outputs):
        raise InputError(f"{where} makes one word twice.")
    if step.operation is Operation.REGISTER and len(step.inputs) != len(step.outputs):
        raise InputError(f"{where}: register makes one word of each that it takes.")
    sums = (*REDUCTIONS, Operation.ADD, Operation.REGISTER)  # of the last two, the rules have more to say
    if set(step.inputs) & set(step.outputs) and step.operation not in sums:
        raise InputError(f"{where} reads what it makes; only a running sum does.")
    if {"a", "b"} & set(step.outputs):
        raise InputError(f"{where} writes an operand.")
    if step.operation in (Operation.ENCODE, Operation.MAP, Operation.SHIFT) and nest.encoding is None:
        raise InputError(f"{where}: the head of the nest names no encoding of a.")


def _count(fewest: int, most: int) -> str:
    return str(fewest) if fewest == most else f"{fewest} or more" if most == _MANY else f"{fewest} or {most}"
