"""The nests of an output-stationary array with two processing elements, written in the notation of `engine.nest`.

Source: arXiv 2503.06342, the baseline output-stationary engine and its first optimisation (compressed accumulation).
"""

from __future__ import annotations

import math

import numpy as np

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError
from bitwright.engine.nest import Loop, Nest, Operation, Statement, Step, Value


def multiply_accumulate(
    rows: int, columns: int, a_bits: int, b_bits: int, accumulator_bits: int, encoding: str | None = "mbe"
) -> Nest:
    """Every step of K finishes the product and adds it to an accumulator: two carry-propagate additions.

    With an encoding the multiplier is digit rows, a carry-save tree and an adder; with None it is one opaque product
    that the synthesis tool may merge with the accumulation.
    """
    operands = (Value("a", a_bits), Value("b", b_bits))
    accumulator = Value("acc", accumulator_bits, state=True)
    accumulate = Step(Operation.ACCUMULATE, ("acc", "p"), ("acc",))
    product = Value("p", a_bits + b_bits)
    if encoding is None:
        body: tuple[Statement, ...] = (Step(Operation.MULTIPLY, ("a", "b"), ("p",)), accumulate)
        nest_body = _output_stationary(rows, columns, body, ())
        return Nest("multiply-accumulate", (*operands, product, accumulator), nest_body, "acc")
    digits, radix = _digits(encoding, a_bits)
    partial, loop = _partial_products(b_bits, a_bits + b_bits, digits, radix)
    pair = (Value("s", a_bits + b_bits), Value("c", a_bits + b_bits))
    body = (
        loop,
        Step(Operation.HALF_REDUCE, ("pp",), ("s", "c")),
        Step(Operation.ADD, ("s", "c"), ("p",)),
        accumulate,
    )
    values = (*operands, *partial, *pair, product, accumulator)
    nest_body = _output_stationary(rows, columns, body, ())
    return Nest("multiply-accumulate", values, nest_body, "acc", encoding, radix)


def compressed_accumulation(
    rows: int, columns: int, a_bits: int, b_bits: int, accumulator_bits: int, encoding: str = "mbe"
) -> Nest:
    """The running sum stays a carry-save pair; one carry-propagate addition per result, outside the array (OPT1)."""
    digits, radix = _digits(encoding, a_bits)
    partial, loop = _partial_products(b_bits, accumulator_bits, digits, radix)
    state = (Value("s", accumulator_bits, state=True), Value("c", accumulator_bits, state=True))
    result = Value("r", accumulator_bits)
    values = (Value("a", a_bits), Value("b", b_bits), *partial, *state, result)
    body = (loop, Step(Operation.HALF_REDUCE, ("pp", "s", "c"), ("s", "c")))
    after = (Step(Operation.ADD, ("s", "c"), ("r",)),)
    return Nest("compressed-accumulation", values, _output_stationary(rows, columns, body, after), "r", encoding, radix)


def _digits(encoding: str, bits: int) -> tuple[int, int]:
    code = encodings.get(encoding)
    if encoding in ("mbe", "ent") and bits % 2:
        raise InputError(f"Encoding {encoding!r} has radix-4 digits and needs an even operand width, not {bits} bits.")
    return int(code.digits(np.zeros(1, dtype=np.int64), bits).shape[-1]), int(code.radix)


def _partial_products(b_bits: int, bits: int, digits: int, radix: int) -> tuple[tuple[Value, ...], Loop]:
    """Digit, digit * b, and the same at its weight, for all bit weights at once.

    |digit| <= radix/2 (or 1), so digit * b needs at most log2(radix) bits more than b: -2 * -128 = 256 has 10 bits.
    """
    growth = max(1, math.ceil(math.log2(radix)))
    values = (
        Value("d", growth + 1, per="bw"),
        Value("m", b_bits + growth, per="bw"),
        Value("pp", bits, per="bw"),
    )
    body = (
        Step(Operation.ENCODE, ("a",), ("d",)),
        Step(Operation.MAP, ("b", "d"), ("m",)),
        Step(Operation.SHIFT, ("m",), ("pp",)),
    )
    return values, Loop("bw", "BW", digits, True, body)


def _output_stationary(
    rows: int, columns: int, body: tuple[Statement, ...], after: tuple[Statement, ...]
) -> tuple[Statement, ...]:
    def across(inner: tuple[Statement, ...]) -> Loop:
        return Loop("mp", "M", rows, True, (Loop("np", "N", columns, True, inner),))

    k_loop = Loop("kt", "K", None, False, (across(body),))
    tile = (k_loop, across(after)) if after else (k_loop,)
    return (Loop("mt", "M", None, False, (Loop("nt", "N", None, False, tile),)),)
