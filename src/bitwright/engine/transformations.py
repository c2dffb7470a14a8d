"""Rewrites of loop nests: each a small function that checks that its move is legal and keeps the result exact.

A sequence is written as lines `NAME ARGUMENTS`, as in a study file; `apply` carries it out. OPT1 to OPT4 of the paper
are such sequences (`named_sequence`), derived from every baseline. After each step the widths are fitted again.

Source: arXiv 2503.06342, the transformations of the bit-weight dimension; `sign_free` is our addition.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.legality import IllegalTransformation, check
from bitwright.engine.nest import (
    REDUCTIONS,
    Loop,
    Nest,
    Operation,
    Statement,
    Step,
    Value,
    loops,
    placed_steps,
    rewrite,
    steps,
)
from bitwright.engine.notation import print_nest
from bitwright.engine.widths import carry_save_pairs, fit_widths, ranges, state_values

_SUMS = (*REDUCTIONS, Operation.ADD)


def retime_add(nest: Nest, value: str) -> Nest:
    """Do not finish `value`: hand its carry-save pair on, and add it where it leaves the loops it is summed in.

    The addition of a pair moves into the sum that reads it; a running sum becomes a pair, added once after its loops.
    Illegal when something other than a sum reads the value (rule 3).
    """
    step = nest.producer(_known(nest, value))
    if step.operation not in (Operation.ADD, Operation.ACCUMULATE):
        raise IllegalTransformation(3, f"{value!r} is made by {step.operation}, not by a carry-propagate addition.")
    pair: tuple[str, ...] = (f"{value}_s", f"{value}_c")
    if carry_save_pairs(nest).get(step.inputs[0]) == step.inputs:
        pair = step.inputs  # the pair exists: only the addition goes
    if step.operation is Operation.ACCUMULATE:
        return _merge(_retime_state(nest, step, value, pair))
    readers = [other for other in steps(nest.body) if value in other.inputs]
    if not readers or any(reader.operation not in (*_SUMS, Operation.REGISTER) for reader in readers):
        raise IllegalTransformation(3, f"{value!r} is not read by sums only, so its addition cannot move into them.")
    body: Sequence[Statement] = nest.body
    if step.inputs == pair:
        body = rewrite(body, lambda item: () if item == step else (item,))
    else:
        reduced = Step(Operation.HALF_REDUCE, step.inputs, pair)
        body = rewrite(body, lambda item: (reduced,) if item == step else (item,))
    values = _declare(nest.values, *(replace(nest.words[value], name=word, signed=True) for word in pair))

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
            values = _declare(values, *(replace(out, name=f"{out.name}_{word}", signed=True) for word in "sc"))
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
            return item, _inside(positions, added)
        return (item,)

    body = rewrite(nest.body, change)
    old = nest.words[value]
    values = tuple(replace(item, state=False) if item.name == value else item for item in nest.values)
    values = _declare(values, *(replace(old, name=word, signed=True) for word in pair))
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


def split(nest: Nest, index: str, factor: str | int, name: str) -> Nest:
    """Cut the temporal loop `index` into itself and an inner temporal loop `name` of `factor` iterations.

    Neighbouring positions go to the inner loop. K is padded with zeros to a multiple.
    """
    count = _whole("factor", factor)
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
    if any(item.operation not in (*_SUMS, Operation.CLEAR) for item in between):
        raise IllegalTransformation(1, f"between loops {index!r} and {inside!r} stands more than sums.")
    if between and loop.dimension not in ("K", "BW"):
        raise IllegalTransformation(1, f"loop {index!r} is not summed over, so it cannot pass sums.")
    summed = {name for item in within if _carries(nest, item) for name in item.outputs}
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
    split_at = next((at for at, item in enumerate(loop.body) if _carries(nest, item)), len(loop.body))
    parallel, sums = loop.body[:split_at], loop.body[split_at:]
    if any(_carries(nest, item) and not set(item.outputs) <= cleared for item in steps(parallel)):
        raise IllegalTransformation(
            1, f"a sum over {index!r} runs inside another loop in it; move {index!r} inwards first."
        )
    if any(isinstance(item, Loop) or not _carries(nest, item) or item.operation not in REDUCTIONS for item in sums):
        raise IllegalTransformation(
            1, f"loop {index!r} holds more than words and the sum of them; move it inwards first."
        )
    replicated = (made | ({"a", "b"} if loop.dimension == "K" else set())) - {
        name for item in steps(sums) for name in item.outputs
    }
    wide = replace(loop, spatial=True, body=parallel)
    body = rewrite(nest.body, lambda item: (wide, *sums) if item == loop else (item,))
    return replace(nest, body=body, values=_replicate(nest.values, replicated, index))


def _carries(nest: Nest, item: Statement) -> bool:
    """Whether a step reads what it writes: a running sum."""
    return isinstance(item, Step) and bool(set(item.inputs) & set(item.outputs))


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
        if step.operation not in (*_SUMS, Operation.CLEAR, Operation.REGISTER) and step not in set(steps(loop.body)):
            raise IllegalTransformation(
                1, f"{step.operation} beside {first.operation} is not a sum over the bit weights."
            )
    plain = rewrite(around.body, lambda item: item.body if isinstance(item, Loop) and item.index == index else (item,))
    turned = replace(around, body=(replace(loop, spatial=False, body=plain),))
    values = tuple(replace(item, per=tuple(name for name in item.per if name != index)) for item in nest.values)
    return replace(nest, body=rewrite(nest.body, lambda item: (turned,) if item == around else (item,)), values=values)


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
        (body for body in _bodies(nest) if weights in body), nest.body
    )  # what surrounds the loop over bit weights
    at = parent.index(weights)
    clears = tuple(item for item in parent[:at] if isinstance(item, Step) and item.operation is Operation.CLEAR)
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
    names = {name for item in clears for name in item.outputs if name in growing}
    values = tuple(replace(value, bits=narrow) if value.name in names else value for value in values)
    part, weighted = f"{result.name}_bw", f"{result.name}_weighted"
    if result.state:  # no addition after the loops: the running sum itself is shifted
        inner, clears = _rename(inner, result.name, part), _rename(clears, result.name, part)
        tail: tuple[Statement, ...] = ()
        made = (Value(part, narrow, result.per, True),)
    else:
        tail = _rename(after, result.name, part)
        made = (Value(part, narrow, result.per),)
    tail_steps = tuple(steps(tail))
    positions = _positions(nest)
    finish = (
        *tail_steps,
        Step(Operation.SHIFT, (part,), (weighted,)),
        Step(Operation.ACCUMULATE, (result.name, weighted), (result.name,)),
    )
    whole = replace(weights, body=(*clears, *inner, _inside(positions, *finish)))
    fresh = (Step(Operation.CLEAR, (), (result.name,)), whole)
    values = (*values, *made, Value(weighted, result.bits, result.per), replace(result, state=True))
    return replace(nest, body=_replace_body(nest.body, parent, at - len(clears), fresh), values=values)


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
    for body in _bodies(nest):
        if loop in body:
            at = body.index(loop)
            break
    following = body[at + 1 : at + 2]
    reader = following[0] if following else None
    if not isinstance(reader, Step) or not _carries(nest, reader) or reader.operation not in REDUCTIONS:
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
    changed = _replace_body(nest.body, body, at, (flags, visit), 2)
    outer = next(other for other in loops(changed) if other.index in ("kt", "bw") and not other.spatial)
    sync = _inside([item for item in loops(nest.body) if item.index == "mp"][:1], Step(Operation.SYNC, (), ()))
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
        step.outputs[0]: [loop.index for loop in outside if loop.spatial and loop.dimension in ("K", "BW")] for step, outside in placed_steps(encoders)
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
    width = _whole("number of lanes", count)
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
        values = _declare(values, replace(value, name=late))
    return replace(nest, body=_join_registers(body), values=values)


def _siblings(nest: Nest, name: str) -> tuple[str, ...]:
    _known(nest, name)
    return (name,) if name in ("a", "b") else nest.producer(name).outputs


def _join_registers(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """Registers of one stage that stand side by side become one step, so that pairs stay together."""
    result: list[Statement] = []
    for item in body:
        if isinstance(item, Loop):
            item = replace(item, body=_join_registers(item.body))
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
        values = _declare(values, replace(nest.words[name], name=increment, bits=1, signed=False))

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
        return replace(nest, body=body, values=_declare(values, replace(nest.words[total], name=biased, state=False)))
    total = growing[0]
    free = f"{total}_unbiased"
    follows = _inside(_positions(nest), Step(Operation.UNBIAS, (total,), (free,)))
    inner = list(steps(outer.body))
    body = rewrite(
        nest.body,
        lambda item: (
            (replace(item, inputs=tuple(free if name == total else name for name in item.inputs)),)
            if isinstance(item, Step) and item not in inner else (item, follows) if item == outer else (item,)
        ),
    )  # fmt: skip
    values = _declare(values, replace(nest.words[total], name=free, state=False))
    return replace(nest, body=body, values=values, result=free if nest.result == total else nest.result)


def _positions(nest: Nest) -> list[Loop]:
    """The loops over M and N around what one position of the array does."""
    found = [loop for loop in loops(nest.body) if loop.index in ("mp", "np")]
    return list({loop.index: loop for loop in found}.values())


def _inside(around: Sequence[Loop], *body: Statement) -> Statement:
    inner = body
    for loop in reversed(around):
        inner = (replace(loop, body=inner),)
    if len(inner) != 1:
        raise InputError("Several steps need a loop around them.")
    return inner[0]


def _bodies(nest: Nest) -> list[tuple[Statement, ...]]:
    return [nest.body, *(loop.body for loop in loops(nest.body))]


def _replace_body(
    body: tuple[Statement, ...], parent: tuple[Statement, ...], at: int, new: tuple[Statement, ...], count: int | None = None
) -> tuple[Statement, ...]:  # fmt: skip
    """Put `new` in place of the `count` statements of `parent` from `at` on (all of them without a count)."""
    end = len(parent) if count is None else at + count
    changed = (*parent[:at], *new, *parent[end:])
    if body == parent:
        return changed
    return tuple(
        replace(item, body=_replace_body(item.body, parent, at, new, count)) if isinstance(item, Loop) else item
        for item in body
    )


def _rename(body: Sequence[Statement], old: str, new: str) -> tuple[Statement, ...]:
    def change(item: Statement) -> tuple[Statement, ...]:
        if isinstance(item, Loop):
            return (item,)
        inputs, outputs = (tuple(new if name == old else name for name in part) for part in (item.inputs, item.outputs))
        return (Step(item.operation, inputs, outputs),)

    return rewrite(body, change)


def _replicate(values: Sequence[Value], names: set[str], index: str) -> tuple[Value, ...]:
    return tuple(replace(value, per=(index, *value.per)) if value.name in names else value for value in values)


def _declare(values: Sequence[Value], *new: Value) -> tuple[Value, ...]:
    known = {value.name for value in values}
    return (*values, *(value for value in new if value.name not in known))


def _known(nest: Nest, name: str) -> str:
    if name not in nest.words:
        raise UnknownNameError(f"value of nest {nest.name!r}", name, tuple(nest.words))
    return name


def _whole(what: str, value: str | int) -> int:
    if not str(value).isdigit() or int(value) < 2:
        raise InputError(f"The {what} is {value!r}; expected a whole number of at least 2.")
    return int(value)


TRANSFORMATIONS: dict[str, Callable[..., Nest]] = {
    function.__name__: function
    for function in (
        retime_add, split, reorder, unroll, roll, hoist_shift, insert_sparse, hoist_encode, lanes, pipeline,
        carry_in_negation, sign_free,
    )
}  # fmt: skip

_PARTIAL_SUMS = {"cube": ("p", "t", "acc"), "tree": ("p", "acc")}
_SERIAL_WEIGHTS = ("roll bw", "reorder kt bw", "hoist_shift")
SEQUENCES = ("opt1", "opt2", "opt3", "opt4c", "opt4e")


def named_sequence(name: str, dataflow: str) -> tuple[str, ...]:
    """The transformations that OPT1, OPT2, OPT3, OPT4C and OPT4E of the paper stand for on a dataflow.

    Raises UnknownNameError for other names, InputError for the serial engines (opt3, opt4c, opt4e) on dataflows whose
    operands do not reach a column of elements together (they replace the elements of os and matrix2d).
    """
    if name not in SEQUENCES:
        raise UnknownNameError("sequence of transformations", name, SEQUENCES)
    sequence = tuple(f"retime_add {value}" for value in _PARTIAL_SUMS.get(dataflow, ("p", "acc")))
    level = SEQUENCES.index(name)
    if level >= 1:
        # One pass per bit weight: four operand pairs at a time keep the rate (a tree has them, if four times as deep).
        if dataflow != "tree":
            sequence += ("split kt 4 kb", f"reorder kb {'kp' if dataflow == 'cube' else 'np'}", "unroll kb")
        sequence += _SERIAL_WEIGHTS
    if level >= 2:
        if dataflow not in ("os", "matrix2d"):
            raise InputError(f"{name} replaces the elements of an os or matrix2d array, not of {dataflow!r}.")
        sequence += ("insert_sparse kb",)
    if level >= 3:
        sequence += ("hoist_encode",)
    return (*sequence, "lanes 4") if level >= 4 else sequence


def apply(nest: Nest, *sequence: str) -> Nest:
    """Carry out transformations, each a line `NAME ARGUMENTS` or the name of a sequence (opt1, opt2, ...).

    Raises UnknownNameError for an unknown transformation; IllegalTransformation with the rule, the failing step and the
    nest before it for a move that is not legal.
    """
    label = []
    for line in sequence:
        if line.strip() in SEQUENCES:
            parts: tuple[str, ...] = named_sequence(line.strip(), nest.dataflow)
            label.append(line.strip())
        else:
            parts = (line,)
            label.append(line.strip().replace(" ", "."))
        for part in parts:
            nest = _carry_out(nest, part)
    return replace(nest, name="+".join(label)) if label else nest


def _carry_out(nest: Nest, line: str) -> Nest:
    name, *arguments = line.split() or [""]
    if name not in TRANSFORMATIONS:
        raise UnknownNameError("transformation", name, (*TRANSFORMATIONS, *SEQUENCES))
    function = TRANSFORMATIONS[name]
    try:
        inspect.signature(function).bind(nest, *arguments)
    except TypeError:
        wanted = " ".join(list(inspect.signature(function).parameters)[1:]).upper()
        raise InputError(f"Transformation {line!r}: expected `{name} {wanted}`.".replace(" `.", "`.")) from None
    try:
        changed = fit_widths(function(nest, *arguments))
        check(changed)
    except IllegalTransformation as error:
        raise IllegalTransformation(error.rule, f"`{line}`: {error.reason}\n{print_nest(nest)}") from None
    return changed
