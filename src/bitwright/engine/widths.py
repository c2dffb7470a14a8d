"""Widths of the words of a nest, from the ranges of values that interval arithmetic gives.

A carry-save pair stands for s + c modulo 2^bits, so each of its words is as wide as the words it is read into. State
that grows with K keeps its declared width; `required_widths` says what it needs for a given K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.format_products import product_unit
from bitwright.engine.nest import Loop, Nest, Operation, Step, Value, placed_steps, steps
from bitwright.engine.rules import IllegalTransformation


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a word, and of the part that depends on b (without the bias of unsigned products).

    `terms` counts the products that it sums; `weighted`: it holds their part at one bit weight, shifted.
    """

    low: int
    high: int
    free_low: int
    free_high: int
    terms: int = 0
    weighted: bool = False

    def times(self, count: int) -> Range:
        """The range of a sum of `count` such words."""
        return Range(
            self.low * count, self.high * count, self.free_low * count, self.free_high * count,
            self.terms * count, self.weighted,
        )  # fmt: skip

    def plus(self, other: Range) -> Range:
        """The range of the sum of two words."""
        return Range(
            self.low + other.low, self.high + other.high,
            self.free_low + other.free_low, self.free_high + other.free_high,
            self.terms + other.terms, self.weighted or other.weighted,
        )  # fmt: skip

    @property
    def bits(self) -> int:
        """Bits of the narrowest word that holds it (two's complement when it can be negative)."""
        return _bits(self.low, self.high)


_ZERO = Range(0, 0, 0, 0)


def _bits(low: int, high: int) -> int:
    if low >= 0:
        return max(1, high.bit_length())
    return max((-low - 1).bit_length(), high.bit_length()) + 1


def ranges(nest: Nest, k: int | None = None) -> dict[str, Range | None]:
    """Bounds of every value; None for what grows with K when `k` is not given, and for what depends on that.

    For a carry-save pair the bounds of its total stand under the first word, zero under the second.
    """
    digits = _digit_range(nest)
    found: dict[str, Range | None] = {}
    for name in ("a", "b"):
        found[name] = Range(*_operand(nest, name), *_operand(nest, name))
    cleared: dict[str, tuple[Loop, ...]] = {}
    for step, outside in placed_steps(nest.body):
        if step.operation is Operation.SYNC:
            continue
        if step.operation is Operation.CLEAR:
            cleared.update(dict.fromkeys(step.outputs, outside))
            found.update(dict.fromkeys(step.outputs, _ZERO))
            continue
        given = [_together(nest, name, outside, found) for name in step.inputs if name not in step.outputs]
        if any(item is None for item in given):
            found.update(dict.fromkeys(step.outputs, None))
            continue
        inputs = [item for item in given if item is not None]
        if step.operation is Operation.REGISTER:
            found.update(zip(step.outputs, inputs, strict=True))
            continue
        total = _result(nest, step, inputs, digits, outside)
        if set(step.inputs) & set(step.outputs):  # a running sum: as often as its loops go round since it was cleared
            times = _iterations(cleared.get(step.outputs[0], ()), outside, k)
            if times is not None and total.weighted and nest.has_loop("bw"):
                weights = {loop.index for loop in outside} - {loop.index for loop in cleared[step.outputs[0]]}
                if "bw" in weights:
                    total, times = _all_weights(nest, total), times // nest.extent("bw")
            found[step.outputs[0]] = None if times is None else total.times(times)
        else:
            found[step.outputs[0]] = total
        # The second word of a pair, or the increment of a multiple, is part of the first one's range.
        found.update(dict.fromkeys(step.outputs[1:], _ZERO))
    return found


def _digit_range(nest: Nest) -> tuple[int, int]:
    if nest.encoding is None:
        return 0, 0
    digits = encodings.get(nest.encoding).digit_set
    return min(digits), max(digits)


def _together(nest: Nest, name: str, outside: Sequence[Loop], found: Mapping[str, Range | None]) -> Range | None:
    """The sum of all elements of a value that a step outside its loops reads."""
    if name not in found:
        raise InputError(f"Nest {nest.name!r}: {name!r} is read before any step makes it.")
    bounds = found[name]
    open_loops = {loop.index for loop in outside}
    if bounds is None:
        return None
    for index in nest.words[name].per:
        if index not in open_loops:
            weights = index == "bw" and bounds.weighted
            bounds = _all_weights(nest, bounds) if weights else bounds.times(nest.extent(index))
    return bounds


def _all_weights(nest: Nest, bounds: Range) -> Range:
    """The sum over all bit weights of a word bounded at the highest one: whole products of a and b, and their bias."""
    product = _products(*(_operand(nest, name) for name in ("a", "b")))
    low, high = (bound * bounds.terms for bound in product)
    if (bounds.low, bounds.high) == (bounds.free_low, bounds.free_high):
        return Range(low, high, low, high, bounds.terms)
    count = nest.extent("bw")
    top, every = nest.radix ** (count - 1), sum(nest.radix**weight for weight in range(count))
    return Range(bounds.low * every // top, bounds.high * every // top, low, high, bounds.terms)


def _operand(nest: Nest, name: str) -> tuple[int, int]:
    half = 1 << (nest.words[name].bits - 1)
    return -half, half - 1


def _products(x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int]:
    found = [left * right for left in x for right in y]
    return min(found), max(found)


def _result(nest: Nest, step: Step, inputs: Sequence[Range], digits: tuple[int, int], outside: Sequence[Loop]) -> Range:
    if step.operation is Operation.ENCODE:
        return Range(*digits, *digits)
    if step.operation in (Operation.MAP, Operation.MULTIPLY):
        x, y = inputs
        low, high = _products((x.low, x.high), (y.low, y.high))
        if nest.product:
            low, high = product_unit(nest.product).range
        if nest.words[step.outputs[0]].signed:
            return Range(low, high, low, high, 1)
        apart = len(step.outputs) > 1
        bias = 1 << (_bits(low, high - apart) - 1)
        return Range(0, 2 * bias - 1 + apart, low, high, 1)
    if step.operation is Operation.SHIFT:
        shifted = inputs[0].times(int(nest.radix ** (nest.extent("bw") - 1)))
        return replace(shifted, terms=inputs[0].terms, weighted=True)
    if step.operation is Operation.UNBIAS:
        only = inputs[0]
        return replace(only, low=only.free_low, high=only.free_high)
    total = _ZERO
    for item in inputs:
        total = total.plus(item)
    return total


def _iterations(clear: Sequence[Loop], outside: Sequence[Loop], k: int | None) -> int | None:
    times = 1
    closed = {loop.index for loop in clear}
    for loop in outside:
        if loop.index in closed or loop.dimension not in ("K", "BW"):
            continue
        if loop.extent is None and k is None:
            return None
        times *= loop.extent if loop.extent is not None else -(-(k or 1) // loop.stride)
    return times


def fit_widths(nest: Nest) -> Nest:
    """The nest with every value as wide as its range needs; state that grows with K keeps its width."""
    found = ranges(nest)
    pairs = carry_save_pairs(nest)
    words = dict(nest.words)
    for name, bounds in found.items():
        value = words[name]
        if name in ("a", "b") or bounds is None or name in pairs:
            continue
        if _maps(nest, name):
            # With its increment apart, the greatest multiple is one less.
            high = bounds.high - (len(nest.producer(name).outputs) > 1)
            words[name] = replace(value, bits=_bits(bounds.low, high))
        elif nest.producer(name).operation is Operation.MULTIPLY:
            # signed even where no product is negative: an unsigned product is one with a bias
            words[name] = replace(value, bits=_bits(min(bounds.low, -1), bounds.high), signed=True)
        else:
            words[name] = replace(value, bits=bounds.bits, signed=bounds.low < 0)
    for step, _ in reversed(list(placed_steps(nest.body))):
        # A pair is as wide as what it is read into. One that grows with K keeps its width.
        for name in step.inputs:
            if name in pairs and name not in step.outputs and not _grows(found, pairs[name]):
                widest = max((words[out].bits for out in step.outputs), default=1)
                for word in pairs[name]:
                    words[word] = replace(words[word], bits=widest, signed=True)
    return replace(nest, values=tuple(words[value.name] for value in nest.values))


def _maps(nest: Nest, name: str) -> bool:
    step = nest.producer(name)
    return step.operation is Operation.MAP and step.outputs[0] == name


def _grows(found: Mapping[str, Range | None], pair: Sequence[str]) -> bool:
    return found.get(pair[0]) is None


def carry_save_pairs(nest: Nest) -> dict[str, tuple[str, ...]]:
    """Word of a carry-save pair -> the words of that pair."""
    found: dict[str, tuple[str, ...]] = {}
    for step, _ in placed_steps(nest.body):
        if step.operation is Operation.HALF_REDUCE:
            found.update(dict.fromkeys(step.outputs, step.outputs))
        if step.operation is Operation.REGISTER and all(name in found for name in step.inputs):
            found.update(dict.fromkeys(step.outputs, step.outputs))
    return found


def required_widths(nest: Nest, k: int) -> dict[str, int]:
    """Bits each state needs so that no sum over K of length `k` overflows (rule 6 of the notation).

    A biased state may wrap: what must fit is its part that depends on b. Zeros that fill K up to what the nest takes at
    a time add nothing. Raises InputError for k < 1.
    """
    if k < 1:
        raise InputError(f"A sum over K has at least one term, not {k}.")
    found = ranges(nest, k)
    needed: dict[str, int] = {}
    pairs = carry_save_pairs(nest)
    for value in nest.states:
        bounds = found.get(pairs[value.name][0] if value.name in pairs else value.name)
        if bounds is not None:
            low, high = bounds.free_low, bounds.free_high
            if bounds.terms > k and not nest.product:  # a product of the codes 0 may be more than zero
                low, high = low * k // bounds.terms, -(-high * k // bounds.terms)
            needed[value.name] = _bits(low, high)
    return needed


def check_depth(nest: Nest, k: int) -> None:
    """Raise IllegalTransformation (rule 6) for a state narrower than the result that sums over K = `k` can leave.

    A state as wide as the result may wrap: the result is one modulo 2^bits anyway. A narrower one, of a single bit
    weight, would make it wrong even so, for the worst operands.
    """
    deepest = largest_depth(nest, k)
    if deepest < k and (lost := _lost_word(nest, k)) and _states_hold(nest, k):
        raise IllegalTransformation(
            6,
            f"{lost!r} has {nest.words[lost].bits} bits, too few for what sums over K = {k} leave in it, and is read "
            f"at a greater width, so the result could be wrong. Declare it wider{_splitting(deepest)}.",
        )
    if deepest < k:
        needed, result = required_widths(nest, k), nest.words[nest.result].bits
        name = next(name for name, bits in needed.items() if nest.words[name].bits < min(bits, result))
        raise IllegalTransformation(
            6,
            f"{name!r} has {nest.words[name].bits} bits; sums over K = {k} need {needed[name]}, so the result could be "
            f"wrong. Give the accumulator more bits{_splitting(deepest)}.",
        )


def largest_depth(nest: Nest, most: int) -> int:
    """The largest K up to `most` whose sums fit every state that is narrower than the result; 0 when none does."""

    def fits(k: int) -> bool:
        return _states_hold(nest, k) and _lost_word(nest, k) is None

    if fits(most):
        return most
    low, high = 0, most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _splitting(deepest: int) -> str:
    return f", or split K: up to {deepest} is safe" if deepest else ", for not even one step of K is safe"


def _states_hold(nest: Nest, k: int) -> bool:
    result = nest.words[nest.result].bits
    return all(nest.words[name].bits >= min(bits, result) for name, bits in required_widths(nest, k).items())


def _lost_word(nest: Nest, k: int) -> str | None:
    """The first word whose true value is known modulo fewer bits than the result has; None when the result is right.

    A word is exact when its range fits its width and what it is made of is exact, or is known modulo as many bits.
    """
    bounds, pairs = ranges(nest, k), carry_save_pairs(nest)
    result = nest.words[nest.result].bits
    exact = 1 << 10  # more bits than any word
    known = {"a": exact, "b": exact}
    lost: str | None = None
    for step in steps(nest.body):
        given = min((known[name] for name in step.inputs), default=exact)
        for name in step.outputs:
            value, bound = nest.words[name], bounds.get(name)
            known[name] = min(value.bits, given)
            if step.operation is Operation.CLEAR or (name in step.outputs[1:] and name not in pairs):
                known[name] = exact  # a cleared state, or an increment
            elif name not in pairs and given >= value.bits and bound is not None:
                low, high = _shortened(bound, k)
                apart = len(step.outputs) > 1  # the greatest multiple is one less: its increment is added apart
                known[name] = exact if _fits(value, (low, high - apart)) else known[name]
            if known[name] < result and name not in pairs and lost is None:
                lost = name
    return lost if known[nest.result] < result else None


def _shortened(bound: Range, k: int) -> tuple[int, int]:
    """The ends of a range without the zeros that fill K up."""
    low, high = bound.free_low, bound.free_high
    bias = bound.low - low
    if bound.terms > k:
        low, high = low * k // bound.terms, -(-high * k // bound.terms)
    return low + bias, high + bound.high - bound.free_high


def _fits(value: Value, ends: tuple[int, int]) -> bool:
    low, high = -(1 << (value.bits - 1)) if value.signed else 0, (1 << (value.bits - value.signed)) - 1
    return low <= ends[0] and ends[1] <= high


def state_values(nest: Nest) -> tuple[Value, ...]:
    """States that grow with K."""
    found = ranges(nest)
    pairs = carry_save_pairs(nest)
    return tuple(value for value in nest.states if found.get(pairs.get(value.name, (value.name,))[0]) is None)
