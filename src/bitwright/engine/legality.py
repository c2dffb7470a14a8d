"""The rules of the notation: which nests compute a matrix product in hardware, and which moves are legal.

1. half_reduce, add and accumulate move freely over K and BW; nothing else may read all words of a dimension at once.
2. shift commutes with sums over K while bw is fixed inside them; words of different bit weights meet only shifted.
3. A running sum over a temporal loop is an accumulator, or a carry-save pair added after the loop.
4. A loop over non-zero digits takes as long as the data wants, so the array synchronises before its results are used.
5. encode and the choice of non-zero digits may stand outside loops over N; map may not, for it reads b.
6. A state holds the largest sum of its K; all arithmetic is modulo 2^bits, a pair is read at its own width only.
Besides, words that meet have passed the same number of pipeline registers.

Source: arXiv 2503.06342, the notation; rules as restated for this implementation.
"""

from __future__ import annotations

from bitwright.core.errors import InputError
from bitwright.engine.evaluate import check_product
from bitwright.engine.iteration_space import check_iteration_space
from bitwright.engine.nest import REDUCTIONS, Loop, Nest, Operation, Step, loops, placed_steps, steps
from bitwright.engine.rules import IllegalTransformation
from bitwright.engine.step_forms import check_forms
from bitwright.engine.widths import carry_save_pairs, check_depth, ranges, required_widths

_SUMS = (*REDUCTIONS, Operation.ADD)


def check(nest: Nest, k: int | None = None) -> None:
    """Raise IllegalTransformation naming the first rule a nest breaks, InputError when it does not compute A @ B.

    With `k`, rule 6 includes the widths of the states for sums over K = `k`. The last resort is a comparison with numpy
    on extreme and random operands (`evaluate.check_product`), which does not depend on the rules.
    """
    check_iteration_space(nest)
    check_forms(nest)
    check_rules(nest)
    _check_words(nest)
    check_product(nest)
    if k is not None:
        check_depth(nest, k)
        for name, bits in required_widths(nest, k).items():
            if bits > nest.words[name].bits:
                raise IllegalTransformation(
                    6, f"{name!r} has {nest.words[name].bits} bits; sums over K = {k} need {bits}."
                )


def check_rules(nest: Nest) -> None:
    """Raise IllegalTransformation naming the first of the rules 1 to 6 that the structure of a nest breaks."""
    placed = list(placed_steps(nest.body))
    _check_definitions(nest)
    _check_lifetimes(nest)
    for step, outside in placed:
        if step.operation not in (*_SUMS, Operation.CLEAR, Operation.SYNC):
            for name in step.inputs:
                if closed := [index for index in nest.words[name].per if not _open(index, outside)]:
                    raise IllegalTransformation(
                        1, f"{step.operation} reads all of {name!r} over {closed[0]!r}, but is not a sum."
                    )
    _check_weights(nest)
    for step, outside in placed:
        if step.operation is Operation.ADD and set(step.inputs) & set(step.outputs):
            raise IllegalTransformation(3, f"{step.outputs[0]!r} is summed by add; a running sum is accumulate.")
        if step.operation is Operation.HALF_REDUCE and len(step.outputs) != 2:
            raise IllegalTransformation(3, "half_reduce makes a pair: two words.")
        if "a" in step.inputs:
            rows = {loop.index for loop in loops(nest.body) if loop.dimension == "M"}
            if missing := sorted(index for index in rows if not _open(index, outside)):
                raise IllegalTransformation(5, f"{step.operation} stands outside the loop {missing[0]!r}, but reads a.")
        if step.operation in (Operation.MAP, Operation.MULTIPLY):
            missing = [
                loop.index for loop in loops(nest.body)
                if loop.dimension == "N" and loop.index in {item.index for _, place in placed for item in place}
                and not _open(loop.index, outside)
            ]  # fmt: skip
            if missing:
                raise IllegalTransformation(5, f"{step.operation} stands outside the loop {missing[0]!r}, but reads b.")
    _check_sparse(nest)
    latencies(nest)
    pairs = carry_save_pairs(nest)
    for step in steps(nest.body):
        for name in step.inputs:
            if name in pairs and any(nest.words[out].bits > nest.words[name].bits for out in step.outputs):
                raise IllegalTransformation(
                    6,
                    f"{step.operation} reads {name!r}, one word of a carry-save pair of {nest.words[name].bits} "
                    "bits, at a greater width; add the pair first, or keep it wider.",
                )


def _check_words(nest: Nest) -> None:
    """Rule 6 for the words between states: each holds whatever its step can make."""
    pairs = carry_save_pairs(nest)
    later = {name for step in steps(nest.body) for name in step.outputs[1:]}  # a carry, or an increment
    for name, bounds in ranges(nest).items():
        value = nest.words[name]
        if bounds is None or value.state or name in pairs or name in later or name in ("a", "b"):
            continue
        low, high = -(1 << (value.bits - 1)) if value.signed else 0, (1 << (value.bits - value.signed)) - 1
        apart = len(nest.producer(name).outputs) > 1  # the greatest multiple is one less: its increment is added apart
        if bounds.low < low or bounds.high - apart > high:
            raise IllegalTransformation(
                6,
                f"{name!r} has {value.bits} {'' if value.signed else 'unsigned '}bits, {low} to {high}; it can become "
                f"{bounds.low} to {bounds.high - apart}.",
            )


def _open(index: str, outside: tuple[Loop, ...]) -> bool:
    return any(loop.index == index for loop in outside)


def _check_definitions(nest: Nest) -> None:
    """Every word is made before it is read; a running sum is cleared."""
    made = {"a", "b"}
    for step in steps(nest.body):
        for name in step.inputs:
            if name not in made:
                hint = "; a running sum starts with clear()" if name in step.outputs else ""
                raise InputError(f"Nest {nest.name!r}: {step.operation} reads {name!r} before it is made{hint}.")
        made.update(step.outputs)
    if nest.result not in made:
        raise InputError(f"Nest {nest.name!r}: no step makes the result {nest.result!r}.")


def _check_lifetimes(nest: Nest) -> None:
    """A word read outside the loop that made it must exist once per iteration of that loop."""
    made: dict[str, tuple[Loop, ...]] = {}
    for step, outside in placed_steps(nest.body):
        inside = {id(loop) for loop in outside}
        for name in step.inputs:
            for loop in made.get(name, ()):
                lost = loop.dimension in ("K", "BW") and loop.index not in nest.words[name].per
                if id(loop) not in inside and lost and not nest.words[name].state:
                    raise IllegalTransformation(
                        1,
                        f"{name!r} is made in the loop {loop.index!r} and read outside it, but not kept for each of "
                        "its iterations.",
                    )
        made.update(dict.fromkeys(step.outputs, outside))


def _check_weights(nest: Nest) -> None:
    """Rule 2: follow which words still lack their bit weight."""
    if nest.encoding is None:
        return
    lacking: set[str] = set()
    cleared_in: dict[str, tuple[Loop, ...]] = {}
    for step, outside in placed_steps(nest.body):
        weighted = _open("bw", outside)
        if step.operation is Operation.CLEAR:
            cleared_in.update(dict.fromkeys(step.outputs, outside))
            lacking -= set(step.outputs)
        elif step.operation is Operation.MAP:
            if not weighted:
                raise IllegalTransformation(2, "map stands outside the loop over bit weights.")
            lacking.update(step.outputs)
        elif step.operation is Operation.SHIFT:
            if not weighted:
                raise IllegalTransformation(2, "shift stands outside the loop over bit weights.")
            if step.inputs[0] not in lacking:
                raise IllegalTransformation(2, f"{step.inputs[0]!r} is shifted already.")
            if len(step.inputs) != len(step.outputs):
                raise IllegalTransformation(2, "shift takes a word, or a word and its increment, and makes as many.")
        elif step.operation is not Operation.ENCODE:
            late = [name for name in step.inputs if name in lacking]
            for name in late:
                if not weighted:
                    raise IllegalTransformation(2, f"{name!r} leaves the loop over bit weights without its shift.")
                running = [out for out in step.outputs if out in step.inputs]
                if any(not _open("bw", cleared_in.get(out, ())) for out in running):
                    raise IllegalTransformation(
                        2, f"{running[0]!r} sums words of different bit weights that are not shifted."
                    )
            if late:
                lacking.update(step.outputs)
            if late and any(name not in lacking for name in step.inputs):
                raise IllegalTransformation(2, f"{step.operation} adds shifted to unshifted words.")
    if nest.result in lacking:
        raise IllegalTransformation(2, f"the result {nest.result!r} was never shifted.")


def _check_sparse(nest: Nest) -> None:
    placed = list(placed_steps(nest.body))
    for position, (_, outside) in enumerate(placed):
        for loop in outside:
            if not loop.sparse:
                continue
            if loop.sparse not in nest.words or nest.producer(loop.sparse).operation is not Operation.ENCODE:
                raise IllegalTransformation(
                    4, f"loop {loop.index!r} visits the digits of {loop.sparse!r}, which no encode makes."
                )
            if loop.index not in nest.words[loop.sparse].per:
                raise IllegalTransformation(4, f"{loop.sparse!r} holds no digit per {loop.index!r}: encode them first.")
            temporal = {item.index for item in outside if not item.spatial and item.dimension in ("K", "BW")}
            synced = any(
                step.operation is Operation.SYNC and not {item.index for item in place} & temporal
                for step, place in placed[position:]
            )
            if not synced:
                raise IllegalTransformation(4, f"no sync follows the loop over the non-zero digits {loop.index!r}.")


def latencies(nest: Nest) -> dict[str, int]:
    """Pipeline registers between the operands and every value. Raises IllegalTransformation where they differ."""
    late: dict[str, int] = {"a": 0, "b": 0}
    for step, _ in placed_steps(nest.body):
        running = set(step.inputs) & set(step.outputs)
        given = {name: late[name] for name in step.inputs if name not in running}
        constant = step.operation in (Operation.CLEAR, Operation.SYNC)
        if len(set(given.values())) > 1 and not any(nest.words[name].state for name in given):
            slow, fast = max(given, key=lambda name: given[name]), min(given, key=lambda name: given[name])
            raise IllegalTransformation(
                3, f"{step.operation} reads {slow!r} {given[slow] - given[fast]} cycle(s) later than {fast!r}."
            )
        value = 0 if constant else max(given.values(), default=0)
        late.update(dict.fromkeys(step.outputs, value + (step.operation is Operation.REGISTER)))
    return late


def stages(nest: Nest) -> int:
    """Pipeline registers on the way from the operands to the state that grows with K, inside one step of K."""
    late = latencies(nest)
    outer: Step | None = None
    for step, outside in placed_steps(nest.body):
        if step.operation in REDUCTIONS and _open("kt", outside) and set(step.inputs) & set(step.outputs):
            outer = step
    return late[outer.outputs[0]] if outer else 0
