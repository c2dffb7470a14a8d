"""Tensor engines: what one is, how many cycles it takes for a matrix product, and what passes its edges.

Two conventions count cycles of C (m, n) = A (m, k) @ B (k, n); R rows, C columns, D depth.

overlapped drain (ours): exactly what our RTL takes, from the cycle the first operands stand at the ports through the
cycle the last result does. S = ceil(k / K positions per step) steps, P passes (one per bit weight when that loop is
temporal, else 1), L the registers between ports and state (hoisted encoders, pipeline stages, the chain of a cube), O
the cycles of the output stage.
    os: P * tiles * (S + R) + R + C - 1 + L + O. A pass occupies the first row for S steps and R drain steps, the skewed
        fill of the next overlaps the drain; tiles = ceil(m/R) * ceil(n/C).
    matrix2d, cube, tree: P * tiles * (S + R) + 1 + L + O. No skew: operands are broadcast (tree: R = 1).
    ws: (P * tiles - 1) * max(m, 2 D) + m + 2 D + C + L + O; tiles = S * ceil(n/C). The weights of the next tile
        load through a second register once the last row has begun the current tile.
    serial engines: as many as the digits of A need, see `engine.serial_cycles`.
scale-sim (SCALE-Sim v3, `Total Cycles` without stalls and prefetch, counted from cycle 0 to the last one):
    os: tiles * (k + R + C - 2) - 1.    ws: tiles * (D + m + D + C - 2) - 1: every tile is charged its load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.quantity import is_whole
from bitwright.core.workload import Gemm
from bitwright.engine.baselines import gemm
from bitwright.engine.format_products import product_unit
from bitwright.engine.hardware_rules import check_hardware
from bitwright.engine.legality import stages
from bitwright.engine.nest import (
    DATAFLOWS,
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
from bitwright.engine.transformations import apply
from bitwright.engine.widths import check_depth

ADDER_BITS = 8  # of the carry-propagate additions outside the array that are done in one cycle
_MOST_WORK = 1 << 51  # multiply-accumulates times passes of one product: its cycles fit 64 bits on any engine
Convention = Literal["overlapped-drain", "scale-sim"]


@dataclass(frozen=True)
class TensorEngine:
    """`rows` (M) x `columns` (N) x `depth` (K) positions of a dataflow, its baseline changed by `transformations`.

    `dataflow`: os, ws, cube, tree, matrix2d (see `engine.baselines.gemm`; ws and tree have one row, os and matrix2d a
    depth of 1). `transformations`: steps or named sequences of `engine.transformations` (opt1, sign_free, ...).
    `multiplier` is "booth" (digits of `encoding`), "tool" (an opaque product) or a product of number-format codes
    (`engine.format_products`), which decides the operand widths itself. Widths in bits. Raises InputError for
    values outside the stated ranges.
    """

    rows: int = 16
    columns: int = 16
    transformations: tuple[str, ...] = ()
    dataflow: str = "os"
    depth: int = 1
    a_bits: int = 8
    b_bits: int = 8
    accumulator_bits: int = 32
    encoding: str = "mbe"
    multiplier: str = "booth"

    def __post_init__(self) -> None:
        for what in ("dataflow", "encoding", "multiplier"):
            if not isinstance(getattr(self, what), str):
                raise InputError(f"Tensor engine: {what} is {getattr(self, what)!r}; expected a name.")
        if not isinstance(self.transformations, tuple | list) or not all(
            isinstance(line, str) for line in self.transformations
        ):
            raise InputError(
                f"Tensor engine: transformations are a tuple of names such as ('opt1',), not {self.transformations!r}."
            )
        if self.dataflow not in DATAFLOWS:
            raise UnknownNameError("dataflow", self.dataflow, DATAFLOWS)
        object.__setattr__(self, "transformations", tuple(self.transformations))
        if self.multiplier not in ("booth", "tool"):
            unit = product_unit(self.multiplier)
            object.__setattr__(self, "a_bits", unit.a_bits)
            object.__setattr__(self, "b_bits", unit.b_bits)
        for what, value, low, high in (
            ("rows", self.rows, 1, 1024), ("columns", self.columns, 1, 1024), ("depth", self.depth, 1, 1024),
            ("a_bits", self.a_bits, 2, 16), ("b_bits", self.b_bits, 2, 16),
            ("accumulator_bits", self.accumulator_bits, 1, 64),
        ):  # fmt: skip
            if not is_whole(value) or not low <= value <= high:
                raise InputError(f"Tensor engine: {what} is {value!r}; expected a whole number of {low} to {high}.")
        booth = self.multiplier in ("booth", "tool")
        least = self.a_bits + self.b_bits if booth else product_unit(self.multiplier).product_bits
        if self.accumulator_bits < least:
            raise InputError(
                f"Tensor engine: {self.accumulator_bits} accumulator bits cannot hold one product of "
                f"{self.a_bits} x {self.b_bits} bits; give at least {least}."
            )

    @cached_property
    def nest(self) -> Nest:
        """The loop nest that evaluation and RTL read. Raises InputError for what the dataflow or encoding has not."""
        baseline = gemm(
            self.dataflow, self.rows, self.columns, self.depth, self.a_bits, self.b_bits, self.accumulator_bits,
            self.encoding if self.multiplier == "booth" else None,
            self.multiplier if self.multiplier not in ("booth", "tool") else None,
        )  # fmt: skip
        return apply(baseline, *self.transformations)

    def resized(self, rows: int, columns: int) -> TensorEngine:
        """The same engine with other numbers of rows and columns; its nest is resized instead of derived again."""
        other = replace(self, rows=rows, columns=columns)
        extents, strides = {"mp": rows, "np": columns}, {"mt": rows, "nt": columns}

        def resize(item: Statement) -> tuple[Statement, ...]:
            if isinstance(item, Step):
                return (item,)
            extent, stride = extents.get(item.index, item.extent), strides.get(item.index, item.stride)
            return (replace(item, extent=extent, stride=stride),)

        other.__dict__["nest"] = replace(self.nest, body=rewrite(self.nest.body, resize))
        return other

    @property
    def serial(self) -> bool:
        """Whether it issues non-zero digits one after the other, so that its cycles depend on the data."""
        return any(loop.sparse for loop in loops(self.nest.body))

    @property
    def passes(self) -> int:
        """Times it goes through K: once per bit weight where that loop is temporal."""
        weights = [loop for loop in loops(self.nest.body) if loop.index == "bw"]
        return weights[0].extent or 1 if weights and not weights[0].spatial else 1

    @property
    def step(self) -> int:
        """Positions of K taken at a time by one element (a chain or tree: all of them)."""
        return self.nest.loop("kt").stride

    @property
    def shares_encoders(self) -> bool:
        """Whether the digits of A are encoded outside the elements, once for all columns."""
        return any(
            step.operation is Operation.ENCODE and not any(loop.index == "np" for loop in outside)
            for step, outside in placed_steps(self.nest.body)
        )

    @property
    def chain(self) -> Loop | None:
        """The spatial loop over K along which a running sum travels, register by register (ws, cube)."""
        if self.dataflow not in ("ws", "cube"):
            return None
        return next(
            loop for loop in loops(self.nest.body)
            if loop.index == "kp" and any(set(step.inputs) & set(step.outputs) for step in steps(loop.body))
        )  # fmt: skip

    @property
    def latency(self) -> int:
        """Registers between the ports and the state that grows with K, besides those of the operands."""
        links = self.depth if self.dataflow == "cube" else 0
        return stages(self.nest) + links + self.shares_encoders

    @property
    def output_cycles(self) -> tuple[int, int]:
        """Cycles of the output stage: for the result of a pass, and (several passes) for adding it to those before.

        Carry-propagate additions there take one cycle per `ADDER_BITS` bits, so that they do not decide the clock.
        """
        inside = {id(loop) for loop in loops(self.nest.loop("kt").body)}
        after = [
            step for step, outside in placed_steps(self.nest.body)
            if any(loop.index == "np" and id(loop) not in inside for loop in outside)
        ]  # fmt: skip
        added = [step for step in after if step.operation in (Operation.ADD, Operation.UNBIAS)]
        first = -(-self.nest.words[added[0].outputs[0]].bits // ADDER_BITS) if added else int(self.passes == 1)
        return first, -(-self.accumulator_bits // ADDER_BITS) if self.passes > 1 else 0

    @property
    def macs_per_cycle(self) -> float:
        """Multiply-accumulates of all positions per cycle at most; a serial engine reaches it on zeros only."""
        positions = self.rows * self.columns * self.step
        return positions / self.passes


def cycles(
    engine: TensorEngine, m: ArrayLike, n: ArrayLike, k: ArrayLike, convention: Convention = "overlapped-drain"
) -> NDArray[np.int64]:
    """Cycles of (m, k) @ (k, n), operands always ready; element-wise over arrays of m, n, k (0-d for scalars).

    Raises InputError for extents below 1, products of more than 2^51 multiply-accumulates, unknown conventions, nests
    without hardware (`hardware_rules.check_hardware`), and serial engines, whose cycles depend on the data;
    IllegalTransformation for a k at which the state of one bit weight could lose a sum (`widths.check_depth`).
    """
    m, n, k = (_extents(name, value) for name, value in (("m", m), ("n", n), ("k", k)))
    rows, columns, depth = engine.rows, engine.columns, engine.depth
    if convention not in ("overlapped-drain", "scale-sim"):
        raise UnknownNameError("cycle convention", convention, ("overlapped-drain", "scale-sim"))
    if convention == "scale-sim" and engine.dataflow not in ("os", "ws"):
        raise InputError(f"SCALE-Sim has no dataflow {engine.dataflow!r}; it counts os and ws.")
    if engine.serial:
        raise InputError("The cycles of a serial engine depend on its operands: use engine.serial_cycles.")
    check_hardware(engine)
    work = m.astype(np.float64) * n * k * engine.passes
    if (work > _MOST_WORK).any():
        raise InputError(f"A matrix product of {work.max():.3g} multiply-accumulates is too large to count; split it.")
    if k.size:
        check_depth(engine.nest, int(k.max()))
    stationary, streamed, side = (k, m, engine.step) if engine.dataflow == "ws" else (m, k, rows)
    tiles = -(-stationary // side) * -(-n // columns)
    if convention == "scale-sim":
        load = depth if engine.dataflow == "ws" else 0
        total = tiles * (load + streamed + side + columns - 2) - 1
    elif engine.dataflow == "ws":
        before = (engine.passes * tiles - 1) * np.maximum(streamed, 2 * depth)
        total = before + streamed + 2 * depth + columns + engine.latency + sum(engine.output_cycles)
    else:
        steps = -(-k // engine.step)
        skew = rows + columns if engine.dataflow == "os" else 2
        total = engine.passes * tiles * (steps + rows) + skew - 1 + engine.latency + sum(engine.output_cycles)
    return np.asarray(total, dtype=np.int64)


def utilisation(
    engine: TensorEngine, m: ArrayLike, n: ArrayLike, k: ArrayLike, convention: Convention = "overlapped-drain"
) -> NDArray[np.float64]:
    """Useful multiply-accumulates per cycle over those all positions could do, 0 to 1."""
    work = np.asarray(m, np.float64) * np.asarray(n, np.float64) * np.asarray(k, np.float64)
    return np.asarray(work / (cycles(engine, m, n, k, convention) * engine.macs_per_cycle))


def buffer_accesses(engine: TensorEngine, gemm: Gemm) -> tuple[int, int, int]:
    """Words of A and B read at the edges of the array, and words written by it (with partial sums), for the batch.

    Padding is not read. Weight stationary: B is read once, A once per column tile; partial sums of every K tile but the
    first are read back, counted with the writes. Others: A is read once per column tile, B once per row tile, results
    written once; with one pass per bit weight everything once per pass, and earlier passes' results read back.
    """
    stationary, side = (gemm.k, engine.depth) if engine.dataflow == "ws" else (gemm.m, engine.rows)
    row_tiles, column_tiles = -(-stationary // side), -(-gemm.n // engine.columns)
    a, b, result = gemm.m * gemm.k, gemm.k * gemm.n, gemm.m * gemm.n
    passes = engine.passes
    if engine.dataflow == "ws":
        return (
            gemm.batch * a * column_tiles * passes,
            gemm.batch * b * passes,
            (gemm.batch * result * (2 * row_tiles * passes - 1)),
        )
    reads = gemm.batch * passes
    return reads * a * column_tiles, reads * b * row_tiles, gemm.batch * result * (2 * passes - 1)


def _extents(name: str, value: ArrayLike) -> NDArray[np.int64]:
    extents = np.asarray(value)
    if not np.issubdtype(extents.dtype, np.integer) or (extents < 1).any() or (extents > _MOST_WORK).any():
        raise InputError(f"Matrix product: {name} is {value!r}; expected whole numbers of 1 to 2^51.")
    return extents.astype(np.int64)
