"""Transformations of words: pipeline registers, and cheaper partial products."""

from __future__ import annotations

from dataclasses import replace

from bitwright.core.errors import InputError
from bitwright.engine.nest import Loop, Nest, Operation, Statement, Step, loops, placed_steps, rewrite, steps
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.transformations.editing import declare, known_value, position_loops, wrap_in_loops
from bitwright.engine.widths import state_values


def pipeline(nest: Nest, *names: str) -> Nest:
    """Put a register behind each of the named values; everything that meets must be equally late.

    Words made together (a carry-save pair, a multiple and its increment) are registered together.
    """
    if not names:
        raise InputError("pipeline needs the names of the values to register.")
    body, values = nest.body, nest.values
    together = [name for given in names for name in _siblings(nest, given)]
    for name in reversed(dict.fromkeys(together)):  # the last one first, so that pairs keep their order
        value = nest.words[name]
        if name in ("a", "b"):
            raise InputError(f"{name!r} is an operand; operands are registered where they enter an element.")
        if value.state:
            raise IllegalTransformation(3, f"{name!r} is a state: it is registered already.")
        step = next(item for item in reversed(list(steps(body))) if name in item.outputs)
        late = f"{name}_r"
        while late in nest.words:
            late += "r"
        readers = [item for item in steps(body) if name in item.inputs]
        if not readers:
            raise IllegalTransformation(3, f"nothing reads {name!r}.")
        renamed = rewrite(
            body,
            lambda item, old=name, new=late: (  # type: ignore[misc]
                (replace(item, inputs=tuple(new if word == old else word for word in item.inputs)),)
                if isinstance(item, Step) else (item,)
            ),
        )  # fmt: skip
        register = Step(Operation.REGISTER, (name,), (late,))
        body = rewrite(renamed, lambda item, at=step, put=register: (item, put) if item == at else (item,))  # type: ignore[misc]
        values = declare(values, replace(value, name=late))
    return replace(nest, body=_join_registers(body), values=values)


def _siblings(nest: Nest, name: str) -> tuple[str, ...]:
    known_value(nest, name)
    return (name,) if name in ("a", "b") else nest.producer(name).outputs


def _join_registers(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """Registers of one stage that stand side by side become one step, so that pairs stay together."""
    result: list[Statement] = []
    for statement in body:
        item = replace(statement, body=_join_registers(statement.body)) if isinstance(statement, Loop) else statement
        last = result[-1] if result else None
        both = isinstance(item, Step) and isinstance(last, Step)
        if both and item.operation is last.operation is Operation.REGISTER and not set(item.inputs) & set(last.outputs):  # type: ignore[union-attr]
            result[-1] = Step(Operation.REGISTER, last.inputs + item.inputs, last.outputs + item.outputs)  # type: ignore[union-attr]
        else:
            result.append(item)
    return tuple(result)


def carry_in_negation(nest: Nest) -> Nest:
    """Negate by inverting, and add the missing 1 in a vacant carry bit of the sum: no multiple -b is formed.

    A partial product becomes a word and an increment of one bit. Every row of full adders leaves the lowest bit of its
    carry word free, so that increments cost no adders. Apply it before `pipeline`.
    """
    step = next((item for item in steps(nest.body) if item.operation is Operation.MAP), None)
    if step is None or len(step.outputs) > 1:
        raise IllegalTransformation(2, "there are no partial products that are whole multiples.")
    word = step.outputs[0]
    values, increments = nest.values, {word: f"{word}_inc"}
    for reader in steps(nest.body):
        if word in reader.inputs and reader.operation is Operation.SHIFT:
            increments[reader.outputs[0]] = f"{reader.outputs[0]}_inc"
    for name, increment in increments.items():
        values = declare(values, replace(nest.words[name], name=increment, bits=1, signed=False))

    def change(item: Statement) -> tuple[Statement, ...]:
        if isinstance(item, Loop):
            return (item,)
        if item.operation is Operation.REGISTER and set(item.inputs) & set(increments):
            raise IllegalTransformation(3, "partial products are registered; apply it before pipeline.")
        if item == step:
            return (replace(item, outputs=(word, increments[word])),)
        inputs = item.inputs + tuple(increments[name] for name in item.inputs if name in increments)
        if item.operation is Operation.SHIFT and item.outputs[0] in increments:
            return (replace(item, inputs=inputs, outputs=(*item.outputs, increments[item.outputs[0]])),)
        return (replace(item, inputs=inputs),)

    return replace(nest, body=rewrite(nest.body, change), values=values)


def sign_free(nest: Nest) -> Nest:
    """Make partial products unsigned by inverting their top bit; take the constant off where sums leave the loops.

    Inverting adds 2^(bits-1), in idle steps too. No sign is extended any more; exact modulo the width of the state.
    """
    maps = [item for item in steps(nest.body) if item.operation is Operation.MAP]
    if not maps or any(not nest.words[item.outputs[0]].signed for item in maps):
        raise IllegalTransformation(6, "there are no signed partial products.")
    made = {item.outputs[0] for item in maps}
    outer = next(loop for loop in loops(nest.body) if loop.index == "kt")
    growing = tuple(value.name for value in state_values(nest) if value.name in {
        name for item in steps(outer.body) for name in item.outputs})  # fmt: skip
    added = [
        item for item, outside in placed_steps(nest.body)
        if item.operation is Operation.ADD and set(item.inputs) <= set(growing) and outer not in outside
    ]  # fmt: skip
    values = tuple(replace(value, signed=False) if value.name in made else value for value in nest.values)
    if added:  # the pair is added after the loops: take the constant off that sum
        total = added[0].outputs[0]
        biased = f"{total}_biased"
        steps_now = (replace(added[0], outputs=(biased,)), Step(Operation.UNBIAS, (biased,), (total,)))
        body = rewrite(nest.body, lambda item: steps_now if item == added[0] else (item,))
        return replace(nest, body=body, values=declare(values, replace(nest.words[total], name=biased, state=False)))
    total = growing[0]
    free = f"{total}_unbiased"
    follows = wrap_in_loops(position_loops(nest), Step(Operation.UNBIAS, (total,), (free,)))
    inner = list(steps(outer.body))
    body = rewrite(
        nest.body,
        lambda item: (
            (replace(item, inputs=tuple(free if name == total else name for name in item.inputs)),)
            if isinstance(item, Step) and item not in inner else (item, follows) if item == outer else (item,)
        ),
    )  # fmt: skip
    values = declare(values, replace(nest.words[total], name=free, state=False))
    return replace(nest, body=body, values=values, result=free if nest.result == total else nest.result)
