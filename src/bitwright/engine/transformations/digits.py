"""Transformations of digits: visiting the non-zero ones only, sharing their encoders, several streams of them."""

from __future__ import annotations

from dataclasses import replace

from bitwright.engine.nest import (
    REDUCTIONS,
    Loop,
    Nest,
    Operation,
    Statement,
    Step,
    loops,
    placed_steps,
    rewrite,
    steps,
)
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.transformations.editing import all_bodies, carries, replace_in_body, whole_number, wrap_in_loops


def insert_sparse(nest: Nest, index: str) -> Nest:
    """Visit only the positions of the spatial loop `index` whose digit is not zero, one after the other.

    The number of steps then depends on the data, so the array synchronises after every block of K (rule 4). The digits
    must be encoded in that loop; over K the bit weight must be the same for all of them (rule 2).
    """
    loop = nest.loop(index)
    inside = list(steps(loop.body))
    encodes = [item for item in inside if item.operation is Operation.ENCODE]
    if not loop.spatial or loop.dimension not in ("K", "BW") or not encodes or not any(
        item.operation is Operation.MAP for item in inside
    ):  # fmt: skip
        raise IllegalTransformation(
            4, f"loop {index!r} is not a spatial loop whose digits are encoded and mapped in it."
        )
    if any(isinstance(item, Loop) for item in loop.body) or any(other.sparse for other in loops(nest.body)):
        raise IllegalTransformation(
            4, f"loop {index!r} holds another loop, or a loop over non-zero digits exists already."
        )
    made = {name for item in inside if item.operation is not Operation.ENCODE for name in item.outputs}
    for body in all_bodies(nest):
        if loop in body:
            at = body.index(loop)
            break
    following = body[at + 1 : at + 2]
    reader = following[0] if following else None
    if not isinstance(reader, Step) or not carries(nest, reader) or reader.operation not in REDUCTIONS:
        raise IllegalTransformation(4, f"the words of loop {index!r} are not summed into a state right after it.")
    if any(set(item.inputs) & made for item in steps(nest.body) if item is not reader and item not in inside):
        raise IllegalTransformation(4, f"the words of loop {index!r} are read by more than one sum.")
    flags = replace(loop, body=tuple(encodes))
    rest = tuple(item for item in loop.body if item not in encodes)
    visit = Loop(index, loop.dimension, loop.extent, False, (*rest, reader), loop.stride, encodes[0].outputs[0])
    values = tuple(
        replace(value, per=tuple(name for name in value.per if name != index)) if value.name in made else value
        for value in nest.values
    )
    changed = replace_in_body(nest.body, body, at, (flags, visit), 2)
    outer = next(other for other in loops(changed) if other.index in ("kt", "bw") and not other.spatial)
    sync = wrap_in_loops([item for item in loops(nest.body) if item.index == "mp"][:1], Step(Operation.SYNC, (), ()))
    changed = rewrite(changed, lambda item: (item, sync) if item == outer else (item,))
    return replace(nest, body=changed, values=values)


def hoist_encode(nest: Nest) -> Nest:
    """Encode once for all columns: encode, and the choice of non-zero digits, leave the loop over N (rule 5)."""
    columns = next((loop for loop in loops(nest.body) if loop.index == "np" and _encodes(loop)), None)
    if columns is None:
        raise IllegalTransformation(5, "no encoder stands inside the loop np.")
    encoders = rewrite(
        columns.body,
        lambda item: (item,) if isinstance(item, Loop) or item.operation is Operation.ENCODE else (),
    )
    rest = rewrite(
        columns.body, lambda item: (item,) if isinstance(item, Loop) or item.operation is not Operation.ENCODE else ()
    )
    if len(rest) == 1 and isinstance(rest[0], Loop) and rest[0].sparse:
        remaining: Statement = replace(rest[0], body=(replace(columns, body=rest[0].body),))
    elif any(loop.sparse for loop in loops(rest)):
        raise IllegalTransformation(5, "more than the loop over non-zero digits stands in np; it cannot be shared.")
    else:
        remaining = replace(columns, body=rest)
    # The digits now outlive the spatial loops they are made in: one for each of their iterations.
    around = {
        step.outputs[0]: [loop.index for loop in outside if loop.spatial and loop.dimension in ("K", "BW")]
        for step, outside in placed_steps(encoders)
        if step.operation is Operation.ENCODE
    }  # fmt: skip
    values = tuple(
        replace(value, per=(*(index for index in around.get(value.name, ()) if index not in value.per), *value.per))
        for value in nest.values
    )
    body = rewrite(nest.body, lambda item: (*encoders, remaining) if item == columns else (item,))
    return replace(nest, body=body, values=values)


def _encodes(loop: Loop) -> bool:
    return any(item.operation is Operation.ENCODE for item in steps(loop.body))


def lanes(nest: Nest, count: str | int) -> Nest:
    """Deal groups of K over `count` digit streams whose partial products meet in one sum with one state.

    Every lane walks through its own non-zero digits; a lane that has run dry adds nothing (rule 4).
    """
    width = whole_number("number of lanes", count)
    sparse = next((loop for loop in loops(nest.body) if loop.sparse), None)
    if sparse is None or nest.has_loop("lane"):
        raise IllegalTransformation(4, "lanes need one loop over non-zero digits: insert_sparse first, and only once.")
    if sparse.dimension != "K":
        raise IllegalTransformation(4, f"lanes deal groups of K, but {sparse.index!r} visits digits of one operand.")
    outer = nest.loop("kt")
    maps = [item for item in steps(sparse.body) if item.operation in (Operation.MAP, Operation.SHIFT)]
    made = {name for item in maps for name in item.outputs} | {"a", "b", str(sparse.sparse)}
    lane = Loop("lane", "K", width, True, (), outer.stride)

    def change(item: Statement) -> tuple[Statement, ...]:
        if isinstance(item, Loop) and item.index == sparse.index and not item.sparse and _encodes(item):
            return (replace(lane, body=(item,)),)
        if isinstance(item, Step) and maps and item == maps[0]:
            return (replace(lane, body=tuple(maps)),)
        return () if item in maps else (item,)

    body = rewrite(nest.body, change)
    body = rewrite(
        body, lambda item: (replace(item, stride=outer.stride * width),)
        if isinstance(item, Loop) and item.index == "kt" else (item,)
    )  # fmt: skip
    values = tuple(replace(value, per=("lane", *value.per)) if value.name in made else value for value in nest.values)
    return replace(nest, body=body, values=values)
