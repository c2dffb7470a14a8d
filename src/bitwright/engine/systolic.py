"""Systolic arrays: what one is, how many cycles it takes for a matrix product, and what passes its edges.

Two conventions count cycles of C (m, n) = A (m, k) @ B (k, n); R rows and C columns, tiles of the result
ceil(m/R)*ceil(n/C) (output stationary) or of the stationary operand ceil(k/R)*ceil(n/C) (weight stationary):

overlapped drain (ours): the drain of a tile overlaps the skewed fill of the next.
    os: tiles * (k + R) + R + C. A tile occupies the first row for k steps and R drain steps; the rest is the skew of
        the last tile, the operand registers and the result register. Counted from the cycle the first operands stand
        at the ports through the cycle the last result stands at the ports: exactly what our RTL takes.
    ws: R + tiles * max(m, R) + R + C - 1: weights of the next tile load through a second register while the current
        tile streams m rows. A model: no RTL is generated for it yet.
scale-sim (SCALE-Sim v3, `Total Cycles` without stalls and prefetch, counted from cycle 0 to the last one):
    os: tiles * (k + R + C - 2) - 1.
    ws: tiles * (R + m + R + C - 2) - 1: the load of the weights is charged to every tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.workload import Gemm
from bitwright.engine.nest import Nest
from bitwright.engine.processing_elements import compressed_accumulation, multiply_accumulate

PROCESSING_ELEMENTS = ("multiply-accumulate", "compressed-accumulation")
Convention = Literal["overlapped-drain", "scale-sim"]


@dataclass(frozen=True)
class SystolicArray:
    """`rows` x `columns` processing elements; A enters from the west, B from the north, results leave at the south.

    `dataflow` is "os" or "ws" (cycles only); `multiplier` is "booth" (digits of `encoding`) or "tool" (an opaque
    product, multiply-accumulate only). Widths in bits. Raises InputError for values outside the stated ranges.
    """

    rows: int = 16
    columns: int = 16
    processing_element: str = "multiply-accumulate"
    dataflow: str = "os"
    a_bits: int = 8
    b_bits: int = 8
    accumulator_bits: int = 32
    encoding: str = "mbe"
    multiplier: str = "booth"

    def __post_init__(self) -> None:
        if self.processing_element not in PROCESSING_ELEMENTS:
            raise UnknownNameError("processing element", self.processing_element, PROCESSING_ELEMENTS)
        if self.dataflow not in ("os", "ws"):
            raise UnknownNameError("dataflow", self.dataflow, ("os", "ws"))
        if self.multiplier not in ("booth", "tool"):
            raise UnknownNameError("multiplier", self.multiplier, ("booth", "tool"))
        if self.multiplier == "tool" and self.processing_element != "multiply-accumulate":
            raise InputError("Compressed accumulation needs the digit rows of its multiplier: use multiplier 'booth'.")
        for what, value, low, high in (
            ("rows", self.rows, 1, 1024), ("columns", self.columns, 1, 1024), ("a_bits", self.a_bits, 2, 16),
            ("b_bits", self.b_bits, 2, 16), ("accumulator_bits", self.accumulator_bits, 1, 64),
        ):  # fmt: skip
            if not low <= value <= high:
                raise InputError(f"Systolic array: {what} is {value}; expected {low} to {high}.")
        if self.accumulator_bits < self.a_bits + self.b_bits:
            raise InputError(
                f"Systolic array: {self.accumulator_bits} accumulator bits cannot hold one product of "
                f"{self.a_bits} x {self.b_bits} bits; give at least {self.a_bits + self.b_bits}."
            )

    @cached_property
    def nest(self) -> Nest:
        """The loop nest that evaluation and RTL read. Raises InputError for a width the encoding cannot split."""
        shape = (self.rows, self.columns, self.a_bits, self.b_bits, self.accumulator_bits)
        if self.processing_element == "compressed-accumulation":
            return compressed_accumulation(*shape, self.encoding)
        return multiply_accumulate(*shape, self.encoding if self.multiplier == "booth" else None)


def cycles(
    array: SystolicArray, m: ArrayLike, n: ArrayLike, k: ArrayLike, convention: Convention = "overlapped-drain"
) -> NDArray[np.int64]:
    """Cycles of (m, k) @ (k, n), operands always ready; element-wise over arrays of m, n, k (0-d for scalars).

    Raises InputError for extents below 1 and unknown conventions.
    """
    m, n, k = (_extents(name, value) for name, value in (("m", m), ("n", n), ("k", k)))
    rows, columns = array.rows, array.columns
    if convention not in ("overlapped-drain", "scale-sim"):
        raise UnknownNameError("cycle convention", convention, ("overlapped-drain", "scale-sim"))
    stationary, streamed = (m, k) if array.dataflow == "os" else (k, m)
    tiles = -(-stationary // rows) * -(-n // columns)
    if convention == "scale-sim":
        load = rows if array.dataflow == "ws" else 0
        total = tiles * (load + streamed + rows + columns - 2) - 1
    elif array.dataflow == "os":
        total = tiles * (streamed + rows) + rows + columns
    else:
        total = rows + tiles * np.maximum(streamed, rows) + rows + columns - 1
    return np.asarray(total, dtype=np.int64)


def gemm_cycles(
    array: SystolicArray, gemms: Sequence[Gemm], convention: Convention = "overlapped-drain"
) -> NDArray[np.int64]:
    """Cycles of every Gemm of a workload (len(gemms),), its batch one product after another."""
    batch, m, n, k = (np.array([getattr(gemm, name) for gemm in gemms], np.int64) for name in ("batch", "m", "n", "k"))
    return np.asarray(batch * cycles(array, m, n, k, convention))


def utilisation(
    array: SystolicArray, m: ArrayLike, n: ArrayLike, k: ArrayLike, convention: Convention = "overlapped-drain"
) -> NDArray[np.float64]:
    """Useful multiply-accumulates per processing element and cycle, 0 to 1."""
    work = np.asarray(m, np.float64) * np.asarray(n, np.float64) * np.asarray(k, np.float64)
    return np.asarray(work / (cycles(array, m, n, k, convention) * float(array.rows * array.columns)))


def buffer_accesses(array: SystolicArray, gemm: Gemm) -> tuple[int, int, int]:
    """Words of A and B read at the edges of the array, and words written by it (with partial sums), for the batch.

    Padding is not read. Output stationary: A is read once per column tile, B once per row tile, results written once.
    Weight stationary: B is read once, A once per column tile; partial sums of every K tile but the first are read
    back, counted with the writes.
    """
    row_tiles = -(-(gemm.m if array.dataflow == "os" else gemm.k) // array.rows)
    column_tiles = -(-gemm.n // array.columns)
    a, b, result = gemm.m * gemm.k, gemm.k * gemm.n, gemm.m * gemm.n
    if array.dataflow == "os":
        return gemm.batch * a * column_tiles, gemm.batch * b * row_tiles, gemm.batch * result
    return gemm.batch * a * column_tiles, gemm.batch * b, gemm.batch * result * (2 * row_tiles - 1)


def _extents(name: str, value: ArrayLike) -> NDArray[np.int64]:
    extents = np.asarray(value)
    if not np.issubdtype(extents.dtype, np.integer) or (extents < 1).any():
        raise InputError(f"Matrix product: {name} is {value!r}; expected whole numbers >= 1.")
    return extents.astype(np.int64)
