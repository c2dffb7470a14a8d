"""Cycles of digit-serial engines (OPT3, OPT4C, OPT4E): exact from the encoded operand, and expected from statistics.

The hardware. A column of the array holds one row m of the encoded operand A and feeds it to all its elements. A *group*
is one bit weight of `group` consecutive k; its non-zero digits are issued one per cycle, an all-zero group takes one
cycle too. A *pass* goes through all groups of a K block at one bit weight; the state holds one weight, so the `lanes`
digit streams of a column (one in OPT3 and OPT4C, four in OPT4E) join at the end of every pass. Group g of a block
belongs to lane g mod `lanes`; K is filled with zeros to a multiple of group * lanes. All columns join at the end of a
block.

    column, block:  sum over bit weights of (max over lanes of (sum over the lane's groups of max(1, non-zero digits)))
    tile:           sum over blocks of (max over columns + bit weights * pass_overhead) + tile_overhead
    array:          tiles = ceil(m / columns) * ceil(n / rows), one after the other

Source: arXiv 2503.06342, serial non-zero digits (OPT3), shared encoders (OPT4C, OPT4E) and synchronisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.encodings import Encoding
from bitwright.core.errors import InputError
from bitwright.core.quantity import is_whole

Counts = NDArray[np.int64]
_TABLE_BITS = 12  # widths up to this one are encoded through a table of all values
_DIGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class ArrayCycles:
    """Cycles of C (m, n) = A (m, k) @ B (k, n) on an array of serial columns.

    `cycles` is the whole product; `busiest_column`, `least_busy_column`, `average_column` are the issue cycles of the
    columns of the array over the product (idle columns of a last tile included), `column_utilisation` is their average
    over the cycles that synchronised columns take (without overheads), `lane_utilisation` that of single digit streams,
    which also wait for each other. `macs` counts the multiply-accumulates, without padding.
    """

    cycles: int
    busiest_column: int
    least_busy_column: int
    average_column: float
    column_utilisation: float
    lane_utilisation: float
    macs: int

    @property
    def macs_per_cycle(self) -> float:
        """Multiply-accumulates of the whole array per cycle."""
        return self.macs / self.cycles


def stream_cycles(
    a: ArrayLike, encoding: Encoding, bits: int = 8, group: int = 4, lanes: int = 1, block: int | None = None,
    idle_cycle: bool = True,
) -> Counts:  # fmt: skip
    """Issue cycles of every digit stream: int64 (m, blocks, lanes, bit weights) of encoded operands `a` (m, k).

    `block` is the length of a K block, cut to a multiple of group * lanes (at least one); None means all of K. Without
    `idle_cycle` an all-zero group takes no cycle: the count of digits that the hardware cannot reach.
    Raises InputError for operands that are not a non-empty integer matrix or do not fit `bits`, and for group, lanes
    or block below 1.
    """
    values = np.asarray(a)
    if values.ndim != 2 or not values.size:
        raise InputError(f"The encoded operand is a matrix (m, k) with at least one value, not {values.shape}.")
    _positive(group=group, lanes=lanes, block=1 if block is None else block)
    step = group * lanes
    steps = -(-values.shape[1] // step)
    per_block = steps if block is None else min(max(1, block // step), steps)
    starts = np.arange(0, steps, per_block)
    flags = _Flags(encoding, bits)
    rows = max(1, _DIGITS_AT_ONCE // (steps * step * flags.count))
    parts = []
    for first in range(0, len(values), rows):
        part = flags.nonzero(values[first : first + rows])
        part = np.pad(part, ((0, 0), (0, steps * step - part.shape[1]), (0, 0)))
        groups = part.reshape(len(part), steps, lanes, group, flags.count)
        issued: NDArray[Any] = groups.sum(axis=3, dtype=np.int64) if group > 255 else _sum_members(groups)
        issued = np.maximum(issued, 1) if idle_cycle else issued
        parts.append(np.add.reduceat(issued, starts, axis=1, dtype=np.int64))
    return np.concatenate(parts)


def column_cycles(
    a: ArrayLike, encoding: Encoding, bits: int = 8, group: int = 4, lanes: int = 1, block: int | None = None
) -> Counts:
    """Issue cycles of the column that holds a row of `a` (m, k), block by block: int64 (m, blocks).

    Arguments and errors are those of `stream_cycles`.
    """
    cycles: Counts = stream_cycles(a, encoding, bits, group, lanes, block).max(axis=2).sum(axis=2)
    return cycles


def array_cycles(
    a: ArrayLike, n: int, columns: int, rows: int, encoding: Encoding, bits: int = 8, group: int = 4, lanes: int = 1,
    block: int | None = None, pass_overhead: int = 0, tile_overhead: int = 0,
) -> ArrayCycles:  # fmt: skip
    """Exact cycles of A (m, k) @ B (k, n), A encoded, on `columns` columns (M) of `rows` elements (N) each.

    `pass_overhead` is what a pass (one bit weight of one block) costs besides its issue cycles, `tile_overhead` what a
    tile costs besides its passes; both are constants of the RTL (pipeline fill, drain, adder). Raises InputError as
    `stream_cycles` does, for sizes below 1 and negative overheads.
    """
    _positive(n=n, columns=columns, rows=rows)
    if min(pass_overhead, tile_overhead) < 0:
        raise InputError(f"Overheads are 0 or more cycles, not {pass_overhead} per pass and {tile_overhead} per tile.")
    streams = stream_cycles(a, encoding, bits, group, lanes, block)
    row_count, blocks, _, weights = streams.shape
    column_tiles, row_tiles = -(-row_count // columns), -(-n // rows)
    per_column = np.pad(
        streams.max(axis=2).sum(axis=2), ((0, column_tiles * columns - row_count), (0, 0))
    ).reshape(column_tiles, columns, blocks)  # fmt: skip
    synchronised = int(per_column.max(axis=1).sum())
    overhead = column_tiles * (blocks * weights * pass_overhead + tile_overhead)
    busy = per_column.sum(axis=(0, 2)) * row_tiles
    depth = np.asarray(a).shape[1]
    return ArrayCycles(
        cycles=(synchronised + overhead) * row_tiles,
        busiest_column=int(busy.max()),
        least_busy_column=int(busy.min()),
        average_column=float(busy.mean()),
        column_utilisation=float(per_column.sum() / (synchronised * columns)),
        lane_utilisation=float(streams.sum() / (synchronised * columns * lanes)),
        macs=row_count * depth * n,
    )


def utilisation_closed_form(k: int, columns: int, mean: float, deviation: float) -> float:
    """1 / (1 + (deviation / mean) * sqrt(2 ln(columns) / k)): share of cycles the average column is busy in a K block.

    `mean` and `deviation` are the issue cycles of one operand. The slowest of `columns` independent normal sums; holds
    for large k. Restates the convergence shown in arXiv 2503.06342 (synchronisation). Raises InputError for sizes below
    1, a mean that is not positive or a negative deviation.
    """
    _positive(k=k, columns=columns)
    if not mean > 0 or not deviation >= 0:
        raise InputError(f"Issue cycles have a positive mean and a deviation of at least 0, not {mean}, {deviation}.")
    return 1 / (1 + deviation / mean * math.sqrt(2 * math.log(columns) / k))


def utilisation_monte_carlo(
    k: int, columns: int, encoding: Encoding, sigma: float = 25.0, bits: int = 8, group: int = 4, lanes: int = 1,
    trials: int = 200, seed: int = 0, idle_cycle: bool = True,
) -> tuple[float, float]:  # fmt: skip
    """Column and lane utilisation of one K block on N(0, sigma) integers, over `trials` blocks of fresh data.

    Values are rounded and clipped to `bits`. The lane utilisation counts what streams lose to each other and to the
    slowest column; `idle_cycle` as in `stream_cycles`. Raises InputError for sizes below 1 and a sigma that is not
    positive.
    """
    _positive(k=k, columns=columns, trials=trials)
    values = normal_operand(trials * columns, k, sigma, bits, seed)
    streams = stream_cycles(values, encoding, bits, group, lanes, idle_cycle=idle_cycle)[:, 0]
    per_column = streams.max(axis=1).sum(axis=1).reshape(trials, columns)
    slowest = per_column.max(axis=1).sum() * columns
    return float(per_column.sum() / slowest), float(streams.sum() / (slowest * lanes))


def normal_operand(m: int, k: int, sigma: float = 25.0, bits: int = 8, seed: int = 0) -> NDArray[np.int64]:
    """Integers (m, k) drawn from N(0, sigma), rounded, clipped to +-(2^(bits-1) - 1)."""
    _positive(m=m, k=k)
    if not sigma > 0:
        raise InputError(f"The deviation of normal data is positive, not {sigma}.")
    most = (1 << (bits - 1)) - 1
    drawn = np.random.default_rng(seed).normal(0.0, sigma, (m, k))
    return np.clip(np.rint(drawn), -most, most).astype(np.int64)


def _sum_members(groups: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Sum over axis 3 in bytes, several times faster than the general sum along a short inner axis."""
    total: NDArray[np.uint8] = groups[..., 0, :].copy()
    for member in range(1, groups.shape[3]):
        np.add(total, groups[..., member, :], out=total)
    return total


class _Flags:
    """Which digits of a value are not zero, through a table where the width allows one."""

    def __init__(self, encoding: Encoding, bits: int) -> None:
        self.encoding, self.bits, self.count = encoding, bits, encoding.digit_count(bits)
        self.table: NDArray[np.uint8] | None = None
        if bits <= _TABLE_BITS:
            low = 1 << (bits - 1)
            self.table = (encoding.digits(np.arange(-low, low), bits) != 0).astype(np.uint8)

    def nonzero(self, values: NDArray[np.generic]) -> NDArray[np.uint8]:
        """uint8 (..., bit weights). Raises InputError for values that are not integers of the width."""
        integers = self._checked(values)
        if self.table is None:
            flags: NDArray[np.uint8] = (self.encoding.digits(integers, self.bits) != 0).astype(np.uint8)
        else:
            flags = np.take(self.table, integers.astype(np.int64) + (1 << (self.bits - 1)), axis=0)
        return flags

    def _checked(self, values: NDArray[np.generic]) -> NDArray[np.integer]:
        if not np.issubdtype(values.dtype, np.integer):
            raise InputError(f"The encoded operand is {values.dtype}; serial engines take integers, quantise first.")
        integers: NDArray[np.integer] = values  # type: ignore[assignment]
        low = 1 << (self.bits - 1)
        if int(integers.min()) < -low or int(integers.max()) >= low:
            raise InputError(
                f"Values from {integers.min()} to {integers.max()} do not fit the {self.bits} bits of the operand."
            )
        return integers


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} is a whole number of at least 1, not {value!r}.")
