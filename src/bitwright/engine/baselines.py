"""The baseline engines as loop nests: every step of K finishes a product and adds it, carry propagated, to a state.

Source: arXiv 2503.06342, the baseline tensor processing engines and their loop nests.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.arithmetic import encodings
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.quantity import is_whole
from bitwright.engine.nest import DATAFLOWS, Loop, Nest, Operation, Statement, Step, Value
from bitwright.engine.widths import fit_widths

REDUCED_IN_SPACE = ("ws", "cube", "tree")


def gemm(
    dataflow: str, rows: int, columns: int, depth: int = 1, a_bits: int = 8, b_bits: int = 8,
    accumulator_bits: int = 32, encoding: str | None = "mbe", product: str | None = None,
) -> Nest:  # fmt: skip
    """C (m, n) = A (m, k) @ B (k, n) on `rows` (M) x `columns` (N) x `depth` (K) multiply-accumulates.

    os, matrix2d: one accumulator per (m, n), depth 1; operands hop from element to element, or are broadcast.
    ws: `depth` rows of stationary B, the running sums travel along K; M streams (rows 1).
    cube: a chain along K per (m, n), then an accumulator. tree: an adder tree along K per column n (rows 1).
    With an encoding the multiplier is digit rows, a carry-save tree and an adder; with None it is one opaque product
    that the synthesis tool may merge with the accumulation, of integers or (`product`) of number-format codes.
    Raises InputError for sizes that are not whole numbers, a depth or rows that the dataflow does not have, or a width
    the encoding cannot split.
    """
    if dataflow not in DATAFLOWS:
        raise UnknownNameError("dataflow", dataflow, DATAFLOWS)
    sizes = {"rows": rows, "columns": columns, "depth": depth, "a_bits": a_bits, "b_bits": b_bits,
             "accumulator_bits": accumulator_bits}  # fmt: skip
    for what, size in sizes.items():
        most = 64 if what.endswith("bits") else 1024
        if not is_whole(size) or not 1 <= size <= most:
            raise InputError(f"gemm: {what} is {size!r}; expected a whole number of 1 to {most}.")
    if dataflow not in REDUCED_IN_SPACE and depth != 1:
        raise InputError(f"Dataflow {dataflow!r} has no spatial K: its depth is 1, not {depth}.")
    if dataflow in ("ws", "tree") and rows != 1:
        raise InputError(f"Dataflow {dataflow!r} works on one row of A at a time: rows is 1, not {rows}.")
    values, multiply, radix = _product(a_bits, b_bits, encoding)
    values += (Value("acc", accumulator_bits, state=True),)
    clear = Step(Operation.CLEAR, (), ("acc",))
    accumulate = Step(Operation.ACCUMULATE, ("acc", "p"), ("acc",))
    across = Loop("kp", "K", depth, True, ())
    if dataflow == "cube":
        values += (Value("t", accumulator_bits, state=True),)
        chain = Step(Operation.ACCUMULATE, ("t", "p"), ("t",))
        total = Step(Operation.ACCUMULATE, ("acc", "t"), ("acc",))
        element: tuple[Statement, ...] = (
            Step(Operation.CLEAR, (), ("t",)), _around(across, (*multiply, chain)), total,
        )  # fmt: skip
    elif dataflow == "tree":
        values = tuple(value if value.state else replace(value, per=("kp", *value.per)) for value in values)
        values += (Value("t", accumulator_bits),)
        total = Step(Operation.ACCUMULATE, ("acc", "t"), ("acc",))
        element = (_around(across, multiply), Step(Operation.ADD, ("p",), ("t",)), total)
    else:
        element = (*multiply, accumulate)
    body: Statement = Loop("np", "N", columns, True, element)
    outer_m, outer_n = Loop("mt", "M", None, False, (), rows), Loop("nt", "N", None, False, (), columns)
    outer_k = Loop("kt", "K", None, False, (), depth)
    if dataflow == "ws":
        tile = (clear, _around(outer_k, (_around(outer_m, (_around(across, (body,)),)),)))
        nest_body = (_around(outer_n, tile),)
    else:
        if dataflow != "tree":
            body = Loop("mp", "M", rows, True, (body,))
        nest_body = (_around(outer_m, (_around(outer_n, (clear, _around(outer_k, (body,)))),)),)
    return fit_widths(Nest("multiply-accumulate", dataflow, values, nest_body, "acc", encoding, radix, product))


def _around(loop: Loop, body: tuple[Statement, ...]) -> Loop:
    return replace(loop, body=body)


def _product(a_bits: int, b_bits: int, encoding: str | None) -> tuple[tuple[Value, ...], tuple[Statement, ...], int]:
    """Values and steps that make the product p of a and b, and the radix of the digits. Widths are fitted later."""
    operands = (Value("a", a_bits), Value("b", b_bits))
    product = Value("p", a_bits + b_bits)
    if encoding is None:
        return (*operands, product), (Step(Operation.MULTIPLY, ("a", "b"), ("p",)),), 2
    code = encodings.get(encoding)
    if code.even_widths and a_bits % 2:
        raise InputError(
            f"Encoding {encoding!r} has radix-4 digits and needs an even operand width, not {a_bits} bits."
        )
    digits = int(code.digits(np.zeros(1, dtype=np.int64), a_bits).shape[-1])
    rows = (
        Step(Operation.ENCODE, ("a",), ("d",)),
        Step(Operation.MAP, ("b", "d"), ("m",)),
        Step(Operation.SHIFT, ("m",), ("pp",)),
    )
    values = (
        *operands, *(Value(name, a_bits + b_bits, ("bw",)) for name in ("d", "m", "pp")),
        Value("p_s", a_bits + b_bits), Value("p_c", a_bits + b_bits), product,
    )  # fmt: skip
    steps: tuple[Statement, ...] = (
        Loop("bw", "BW", digits, True, rows),
        Step(Operation.HALF_REDUCE, ("pp",), ("p_s", "p_c")),
        Step(Operation.ADD, ("p_s", "p_c"), ("p",)),
    )
    return values, steps, int(code.radix)
