"""Transformations of sums: where carries are propagated, and where bit weights are shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bitwright.engine.nest import Loop, Nest, Operation, Statement, Step, Value, placed_steps, rewrite, steps
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.transformations.editing import (
    SUMS,
    all_bodies,
    declare,
    known_value,
    position_loops,
    rename_value,
    replace_in_body,
    wrap_in_loops,
)
from bitwright.engine.widths import carry_save_pairs, state_values


def retime_add(nest: Nest, value: str) -> Nest:
    """Do not finish `value`: hand its carry-save pair on, and add it where it leaves the loops it is summed in.

    The addition of a pair moves into the sum that reads it; a running sum becomes a pair, added once after its loops.
    Illegal when something other than a sum reads the value (rule 3).
    """
    step = nest.producer(known_value(nest, value))
    if step.operation not in (Operation.ADD, Operation.ACCUMULATE):
        raise IllegalTransformation(3, f"{value!r} is made by {step.operation}, not by a carry-propagate addition.")
    pair: tuple[str, ...] = (f"{value}_s", f"{value}_c")
    if carry_save_pairs(nest).get(step.inputs[0]) == step.inputs:
        pair = step.inputs  # the pair exists: only the addition goes
    if step.operation is Operation.ACCUMULATE:
        return _merge(_retime_state(nest, step, value, pair))
    readers = [other for other in steps(nest.body) if value in other.inputs]
    if not readers or any(reader.operation not in (*SUMS, Operation.REGISTER) for reader in readers):
        raise IllegalTransformation(3, f"{value!r} is not read by sums only, so its addition cannot move into them.")
    body: Sequence[Statement] = nest.body
    if step.inputs == pair:
        body = rewrite(body, lambda item: () if item == step else (item,))
    else:
        reduced = Step(Operation.HALF_REDUCE, step.inputs, pair)
        body = rewrite(body, lambda item: (reduced,) if item == step else (item,))
    values = declare(nest.values, *(replace(nest.words[value], name=word, signed=True) for word in pair))

    def substitute(item: Statement) -> tuple[Statement, ...]:
        if not isinstance(item, Step) or value not in item.inputs:
            return (item,)
        if item.operation is Operation.REGISTER:
            raise IllegalTransformation(3, f"{value!r} is registered; retime it before inserting pipeline registers.")
        inputs = tuple(word for name in item.inputs for word in (pair if name == value else (name,)))
        if item.operation is not Operation.ADD:
            return (replace(item, inputs=inputs),)
        # A sum of several pairs: reduce them first, so that only one carry-propagate addition is left.
        total = (f"{item.outputs[0]}_s", f"{item.outputs[0]}_c")
        return Step(Operation.HALF_REDUCE, inputs, total), Step(Operation.ADD, total, item.outputs)

    for reader in readers:
        if reader.operation is Operation.ADD:
            out = nest.words[reader.outputs[0]]
            values = declare(values, *(replace(out, name=f"{out.name}_{word}", signed=True) for word in "sc"))
    body = rewrite(body, substitute)
    values = tuple(item for item in values if item.name != value)
    return _merge(replace(nest, body=tuple(body), values=values))


def _retime_state(nest: Nest, step: Step, value: str, pair: tuple[str, ...]) -> Nest:
    others = tuple(name for name in step.inputs if name != value)
    reduced = Step(Operation.HALF_REDUCE, (*others, *pair), pair)
    added = Step(Operation.ADD, pair, (value,))
    place = next(outside for item, outside in placed_steps(nest.body) if item == step)
    cleared = next(
        (outside for item, outside in placed_steps(nest.body)
         if item.operation is Operation.CLEAR and value in item.outputs), None,
    )  # fmt: skip
    if cleared is None:
        raise IllegalTransformation(3, f"the running sum {value!r} is never cleared.")
    outer = place[len(cleared)]  # the outermost loop the sum runs in: the addition follows it
    positions = [loop for loop in place[len(cleared) :] if loop.dimension in ("M", "N")]

    def change(item: Statement) -> tuple[Statement, ...]:
        if item == step:
            return (reduced,)
        if isinstance(item, Step) and item.operation is Operation.CLEAR and value in item.outputs:
            kept = tuple(name for name in item.outputs if name != value)
            return (Step(Operation.CLEAR, (), (*kept, *pair)),)
        if isinstance(item, Loop) and item.index == outer.index and reduced in steps(item.body):
            return item, wrap_in_loops(positions, added)
        return (item,)

    body = rewrite(nest.body, change)
    old = nest.words[value]
    values = tuple(replace(item, state=False) if item.name == value else item for item in nest.values)
    values = declare(values, *(replace(old, name=word, signed=True) for word in pair))
    return replace(nest, body=body, values=values)


def _merge(nest: Nest) -> Nest:
    """Feed the words of a carry-save reduction that only another one reads directly into that one."""
    for step in steps(nest.body):
        if step.operation is not Operation.HALF_REDUCE or any(nest.words[name].state for name in step.outputs):
            continue
        readers = [other for other in steps(nest.body) if set(other.inputs) & set(step.outputs)]
        if len(readers) != 1 or readers[0].operation is not Operation.HALF_REDUCE:
            continue
        reader = readers[0]
        kept = tuple(name for name in reader.inputs if name not in step.outputs)
        merged = replace(reader, inputs=step.inputs + kept)
        replaced = {step: (), reader: (merged,)}
        body = rewrite(
            nest.body,
            lambda item, to=replaced: to.get(item, (item,)) if isinstance(item, Step) else (item,),  # type: ignore[misc]
        )
        values = tuple(value for value in nest.values if value.name not in step.outputs)
        return _merge(replace(nest, body=body, values=values))
    return nest


def reduce_apart(nest: Nest, value: str) -> Nest:
    """Reduce what a running carry-save pair takes in to a pair of its own before it meets the states (rule 1).

    `value`: one word of the running pair. The new pair, `VALUE_in`, can be pipelined: fewer words to register than
    the partial products, and two rows of full adders behind the states. Our addition.
    """
    step = nest.producer(known_value(nest, value))
    if step.operation is not Operation.HALF_REDUCE or not set(step.outputs) <= set(step.inputs):
        raise IllegalTransformation(1, f"{value!r} is not a word of a running carry-save pair; apply retime_add first.")
    others = tuple(name for name in step.inputs if name not in step.outputs)
    if carry_save_pairs(nest).get(others[0]) == others:
        raise IllegalTransformation(1, f"{value!r} takes in a single carry-save pair already.")
    pair = tuple(f"{name}_in" for name in step.outputs)
    apart = (Step(Operation.HALF_REDUCE, others, pair), replace(step, inputs=(*pair, *step.outputs)))
    values = declare(
        nest.values,
        *(replace(nest.words[old], name=new, state=False) for old, new in zip(step.outputs, pair, strict=True)),
    )
    return replace(nest, body=rewrite(nest.body, lambda item: apart if item == step else (item,)), values=values)


def hoist_shift(nest: Nest) -> Nest:
    """Sum the words of one bit weight first and shift the sum once, after the loop over K (rule 2).

    Needs the loop over BW to be temporal and outside K. The result then adds the shifted sums of all bit weights.
    """
    found = [(item, outside) for item, outside in placed_steps(nest.body) if item.operation is Operation.SHIFT]
    if len(found) != 1:
        raise IllegalTransformation(2, "there is no shift inside the loops over K.")
    shift, place = found[0]
    order = [loop.index for loop in place if not loop.spatial]
    if "bw" not in order or "kt" not in order or order.index("bw") > order.index("kt"):
        raise IllegalTransformation(
            2, "shift leaves the loop over K only if BW is temporal and outside that loop: roll bw, then reorder kt bw."
        )
    weights = nest.loop("bw")
    parent = next(
        (body for body in all_bodies(nest) if weights in body), nest.body
    )  # what surrounds the loop over bit weights
    at = parent.index(weights)
    clears: tuple[Statement, ...] = tuple(
        item for item in parent[:at] if isinstance(item, Step) and item.operation is Operation.CLEAR
    )
    after = parent[at + 1 :]
    sources = dict(zip(shift.outputs, shift.inputs, strict=True))
    inner = rewrite(
        weights.body,
        lambda item: (
            () if item == shift else
            (replace(item, inputs=tuple(sources.get(name, name) for name in item.inputs)),)
            if isinstance(item, Step) else (item,)
        ),
    )  # fmt: skip
    result = nest.words[nest.result]
    narrow = result.bits - (nest.extent("bw") - 1) * (nest.radix.bit_length() - 1)
    values = tuple(value for value in nest.values if value.name not in (*sources, result.name))
    growing = {value.name for value in state_values(nest)}
    names = {name for item in steps(clears) for name in item.outputs if name in growing}
    values = tuple(replace(value, bits=narrow) if value.name in names else value for value in values)
    part, weighted = f"{result.name}_bw", f"{result.name}_weighted"
    if result.state:  # no addition after the loops: the running sum itself is shifted
        inner, clears = rename_value(inner, result.name, part), rename_value(clears, result.name, part)
        tail: tuple[Statement, ...] = ()
        made = (Value(part, narrow, result.per, True),)
    else:
        tail = rename_value(after, result.name, part)
        made = (Value(part, narrow, result.per),)
    tail_steps = tuple(steps(tail))
    positions = position_loops(nest)
    finish = (
        *tail_steps,
        Step(Operation.SHIFT, (part,), (weighted,)),
        Step(Operation.ACCUMULATE, (result.name, weighted), (result.name,)),
    )
    whole = replace(weights, body=(*clears, *inner, wrap_in_loops(positions, *finish)))
    fresh = (Step(Operation.CLEAR, (), (result.name,)), whole)
    values = (*values, *made, Value(weighted, result.bits, result.per), replace(result, state=True))
    return replace(nest, body=replace_in_body(nest.body, parent, at - len(clears), fresh), values=values)
