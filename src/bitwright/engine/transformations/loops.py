"""Transformations of loops: tiling, order, and whether a loop runs in time or in space."""

from __future__ import annotations

from dataclasses import replace

from bitwright.core.errors import InputError
from bitwright.engine.nest import REDUCTIONS, Loop, Nest, Operation, loops, placed_steps, rewrite, steps
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.transformations.editing import SUMS, carries, replicate_values, whole_number
from bitwright.engine.widths import carry_save_pairs, ranges


def split(nest: Nest, index: str, factor: str | int, name: str) -> Nest:
    """Cut the temporal loop `index` into itself and an inner temporal loop `name` of `factor` iterations.

    Neighbouring positions go to the inner loop. K is padded with zeros to a multiple.
    """
    count = whole_number("factor", factor)
    loop = nest.loop(index)
    if not name.isidentifier() or name[0] != loop.dimension[0].lower():
        raise InputError(
            f"A part of {index!r} cannot be named {name!r}: names of loops over {loop.dimension} start with "
            f"{loop.dimension[0].lower()!r}."
        )
    if nest.has_loop(name):
        raise InputError(f"Nest {nest.name!r} already has a loop {name!r}.")
    if loop.spatial or loop.sparse or loop.dimension == "BW":
        raise IllegalTransformation(1, f"only temporal loops over M, N or K are split, and {index!r} is not one.")
    if loop.extent is not None and loop.extent % count:
        raise InputError(f"Loop {index!r} has {loop.extent} iterations, which {count} does not divide.")
    inner = Loop(name, loop.dimension, count, False, loop.body, loop.stride)
    extent = None if loop.extent is None else loop.extent // count
    outer = replace(loop, body=(inner,), stride=loop.stride * count, extent=extent)
    return replace(nest, body=rewrite(nest.body, lambda item: (outer,) if item == loop else (item,)))


def reorder(nest: Nest, index: str, inside: str) -> Nest:
    """Move the loop `index` inwards to just inside the loop `inside`, past nothing but sums (rule 1).

    Sums over K and BW may be taken in any order: what stands between the two loops then happens once, on the whole sum.
    A loop over non-zero digits stays where it is (rule 4).
    """
    loop = nest.loop(index)
    target = next((item for item in loops(loop.body) if item.index == inside), None)
    if target is None:
        raise IllegalTransformation(1, f"loop {inside!r} is not inside loop {index!r}.")
    if any(item.sparse for item in (loop, *loops(loop.body))):
        raise IllegalTransformation(4, "a loop over non-zero digits has its own pace and cannot be exchanged.")
    within = set(steps(target.body))
    between = [item for item in steps(loop.body) if item not in within]
    if any(item.operation not in (*SUMS, Operation.CLEAR) for item in between):
        raise IllegalTransformation(1, f"between loops {index!r} and {inside!r} stands more than sums.")
    if between and loop.dimension not in ("K", "BW"):
        raise IllegalTransformation(1, f"loop {index!r} is not summed over, so it cannot pass sums.")
    summed = {name for item in within if carries(nest, item) for name in item.outputs}
    first = {name for item in between if item.operation is not Operation.CLEAR for name in item.inputs}
    if not first <= summed | {name for item in between for name in item.outputs}:
        raise IllegalTransformation(1, f"words made in loop {inside!r} are read outside it: unroll or sum them first.")
    inner = replace(target, body=(replace(loop, body=target.body),))
    outside = rewrite(loop.body, lambda item: (inner,) if item == target else (item,))
    moved = replace(nest, body=rewrite(nest.body, lambda item: outside if item == loop else (item,)))
    # What now grows with K needs the width of the result, both words of a pair.
    before, pairs = ranges(nest), carry_save_pairs(nest)
    growing = [name for name, bounds in ranges(moved).items() if bounds is None and before[name] is not None]
    grown = {word for name in growing for word in pairs.get(name, (name,))}
    width = nest.words[nest.result].bits
    values = tuple(replace(value, bits=width) if value.name in grown else value for value in nest.values)
    return replace(moved, values=values)


def unroll(nest: Nest, index: str) -> Nest:
    """Make a temporal loop spatial: its iterations run side by side, and one sum takes all their words (rule 1)."""
    loop = nest.loop(index)
    if loop.spatial or loop.extent is None or loop.dimension not in ("K", "BW") or loop.sparse:
        raise IllegalTransformation(
            1, f"only a temporal loop over K or BW with a fixed extent is unrolled, not {index!r}."
        )
    made = {name for item in steps(loop.body) for name in item.outputs}
    cleared = {name for item in steps(loop.body) if item.operation is Operation.CLEAR for name in item.outputs}
    split_at = next((at for at, item in enumerate(loop.body) if carries(nest, item)), len(loop.body))
    parallel, sums = loop.body[:split_at], loop.body[split_at:]
    if any(carries(nest, item) and not set(item.outputs) <= cleared for item in steps(parallel)):
        raise IllegalTransformation(
            1, f"a sum over {index!r} runs inside another loop in it; move {index!r} inwards first."
        )
    if any(isinstance(item, Loop) or not carries(nest, item) or item.operation not in REDUCTIONS for item in sums):
        raise IllegalTransformation(
            1, f"loop {index!r} holds more than words and the sum of them; move it inwards first."
        )
    replicated = (made | ({"a", "b"} if loop.dimension == "K" else set())) - {
        name for item in steps(sums) for name in item.outputs
    }
    wide = replace(loop, spatial=True, body=parallel)
    body = rewrite(nest.body, lambda item: (wide, *sums) if item == loop else (item,))
    return replace(nest, body=body, values=replicate_values(nest.values, replicated, index))


def roll(nest: Nest, index: str) -> Nest:
    """Make a spatial loop over BW temporal, around everything a step of K does: one bit weight after the other.

    The sums that took all its words at once take them in turn (rule 1).
    """
    loop = nest.loop(index)
    if not loop.spatial or loop.dimension != "BW":
        raise IllegalTransformation(1, f"only a spatial loop over BW is made temporal, not {index!r}.")
    around = next(
        (other for other in loops(nest.body) if other.index == "kt" and loop in list(loops(other.body))), None
    )
    if around is None:
        raise IllegalTransformation(1, f"loop {index!r} is not inside a temporal loop over K.")
    first = next(item for item, outside in placed_steps(nest.body) if loop in outside)
    for step in steps(around.body):
        if step.operation not in (*SUMS, Operation.CLEAR, Operation.REGISTER) and step not in set(steps(loop.body)):
            raise IllegalTransformation(
                1, f"{step.operation} beside {first.operation} is not a sum over the bit weights."
            )
    plain = rewrite(around.body, lambda item: item.body if isinstance(item, Loop) and item.index == index else (item,))
    turned = replace(around, body=(replace(loop, spatial=False, body=plain),))
    values = tuple(replace(item, per=tuple(name for name in item.per if name != index)) for item in nest.values)
    return replace(nest, body=rewrite(nest.body, lambda item: (turned,) if item == around else (item,)), values=values)
