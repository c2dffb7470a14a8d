"""Cycles of bit-slice and bit-serial processing elements on real INT8 operands.

All functions take A (m, k) and W (k, n), int8, and count the cycles that one processing element (PE) needs for every
multiply-accumulate of A @ W, one result after the other, without fill, drain and memory stalls:

| function | a group is | cycles of a group (at least 1) |
|---|---|---|
| `laconic_cycles` | `lanes` operand pairs of one result | largest product of the non-zero digits of a pair |
| `bitlet_cycles` | `group` weights of one result | ones of the fullest bit position, all positions in parallel |
| `sibia_cycles` | `lanes` operand pairs of one result | non-zero slice vectors times the slices of the other operand |
| `bitwave_cycles` | `group` weights of one result | bit positions in which any weight has a one |
| `serial_digit_cycles` | four operands at one bit weight | non-zero digits (OPT3, OPT4C, OPT4E) |

A last group with fewer than its full number of operands counts like a full one whose missing operands are zero.
Sources are given with each function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.encodings import Encoding, get
from bitwright.core.errors import InputError
from bitwright.core.quantity import is_whole
from bitwright.engine.serial_cycles import column_cycles

Int8Matrix = NDArray[np.int8]
Counts = NDArray[np.int64]
_Scalar = TypeVar("_Scalar", bound=np.generic)
SLICE_BITS = 3  # a signed slice holds three bits of the operand and a sign
_ROWS_AT_ONCE = 1024
_BITS = 8
_GROUP = 4  # operands that an OPT3 or OPT4 encoder scans together


@dataclass(frozen=True)
class BitSliceCycles:
    """Cycles of one PE for `macs` multiply-accumulates, and how much of its `lanes` x `cycles` slots did useful work.

    `operations` counts useful slots: term pairs (Laconic), ones of the weights (Bitlet, BitWave), non-zero slices times
    slices of the other operand (Sibia), non-zero digits (OPT3, OPT4). `lanes` is the number of operations per cycle.
    """

    cycles: int
    macs: int
    lanes: int
    operations: int

    @property
    def cycles_per_mac(self) -> float:
        """Cycles of the PE per multiply-accumulate."""
        return self.cycles / self.macs

    @property
    def macs_per_cycle(self) -> float:
        """Multiply-accumulates per cycle."""
        return self.macs / self.cycles

    @property
    def operations_per_mac(self) -> float:
        """Useful operations per multiply-accumulate: for Laconic the mean number of term pairs."""
        return self.operations / self.macs

    @property
    def lane_maximum_penalty(self) -> float:
        """Cycles over those of lanes that never wait, at least 1; infinite when there is nothing to do at all."""
        return self.cycles * self.lanes / self.operations if self.operations else math.inf

    @property
    def utilisation(self) -> float:
        """Share of lane slots that do useful work, the inverse of the penalty."""
        return self.operations / (self.cycles * self.lanes)


def term_pairs(a: ArrayLike, w: ArrayLike, encoding: Encoding) -> Counts:
    """Term pairs of the products a * w: non-zero digits of `a` times those of `w`, element by element (broadcast).

    Raises InputError when an operand is not int8 or the shapes do not fit.
    """
    left, right = _terms(_int8(a, "a"), encoding), _terms(_int8(w, "w"), encoding)
    try:
        pairs: Counts = left.astype(np.int64) * right
    except ValueError:
        raise InputError(f"Shapes {left.shape} and {right.shape} do not broadcast to pairs of operands.") from None
    return pairs


def laconic_cycles(
    a: ArrayLike, w: ArrayLike, lanes: int = 16, encoding: str = "csd", tile: tuple[int, int] = (1, 1)
) -> BitSliceCycles:
    """Laconic: `lanes` operand pairs of one result at once, one term pair per lane and cycle; the slowest lane decides.

    A group takes max(1, largest number of term pairs of its lanes) cycles. `tile` = (r, c) couples r rows of A with c
    columns of W: r x c PEs start every group together and wait for the slowest; cycles of PEs without a result (at the
    edges) are charged as well. (1, 1) is a PE that never waits for another.
    Source: S. Sharify et al., Laconic, ISCA 2019, arXiv 1805.04513; 16 lanes, the product rule, one cycle for zeros and
    the wait of the tile (16x16 by default) as in DNNsim (github.com/isakedo/DNNsim), the simulator of that group. Its
    Booth-like recoding of |x| has the digit count of the canonical signed digit for 119 of 128 magnitudes and one more
    for the other nine.
    Raises InputError for operands that are not int8 matrices of matching shapes, lanes < 1, and a tile below 1x1.
    """
    left, right = _operands(a, w)
    _positive("lanes", lanes)
    if len(tile) != 2 or min(tile) < 1:
        raise InputError(f"A tile has at least one row and one column of PEs, not {tile}.")
    code = get(encoding)
    rows = _grouped(_terms(left, code), lanes)  # (m, groups, lanes)
    columns = _grouped(_terms(right.T, code), lanes)  # (n, groups, lanes)
    cycles = 0
    step = tile[0] * max(1, _ROWS_AT_ONCE // tile[0])
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        for group in range(rows.shape[1]):
            longest = np.ones((len(part), len(columns)), np.uint8)
            for lane in range(lanes):
                pairs = part[:, group, lane, None] * columns[:, group, lane]  # at most 8 * 8
                np.maximum(longest, pairs, out=longest)
            if tile != (1, 1):
                longest = np.maximum.reduceat(longest, np.arange(0, longest.shape[0], tile[0]), axis=0)
                longest = np.maximum.reduceat(longest, np.arange(0, longest.shape[1], tile[1]), axis=1)
            cycles += int(longest.sum(dtype=np.int64)) * tile[0] * tile[1]
    pairs_in_all = int(rows.sum(axis=0, dtype=np.int64).ravel() @ columns.sum(axis=0, dtype=np.int64).ravel())
    return BitSliceCycles(cycles, _macs(left, right), lanes, pairs_in_all)


def bitlet_cycles(a: ArrayLike, w: ArrayLike, group: int = 64, window: int | None = None) -> BitSliceCycles:
    """Bitlet: one lane per bit position takes the ones of that position out of `group` sign-magnitude weights.

    Every cycle each position contributes the activation of its next one, so a group takes as many cycles as its
    fullest position has ones, at least one. With `window` the lanes work as in the released RTL (8): a lane sees that
    many weights, takes the first one among them, and moves to the second, or past the window when there is none; a
    group then takes at least group / window cycles. Eight lanes: seven positions and 2^7, which only -128 uses.
    Source: H. Lu et al., Distilling Bit-level Sparsity Parallelism, MICRO 2021, and its RTL
    (github.com/Zhu-Zixuan/Bitlet-PE: 64 weights, windows of 8, sign and magnitude).
    Raises InputError for bad operands (see `laconic_cycles`), and a group or window below 1.
    """
    left, right = _operands(a, w)
    _positive("group", group)
    bits = _magnitude_bits(right.T, group)  # (n, groups, group, positions)
    ones = bits.sum(axis=2, dtype=np.int64)
    if window is None:
        lane_cycles = ones
    else:
        _positive("window", window)
        lane_cycles = _window_cycles(np.moveaxis(bits, 2, -1), window)
    cycles = int(np.maximum(lane_cycles.max(axis=-1), 1).sum())
    return BitSliceCycles(cycles * len(left), _macs(left, right), _BITS, int(ones.sum()) * len(left))


def signed_bit_slices(values: ArrayLike, slices: int = 3) -> NDArray[np.int8]:
    """Slices s of signed integers, int8 of shape (..., slices), lowest first: value = sum of s[i] * 8^i.

    The lower slices of a negative value carry its sign (their three bits minus 8) and the slice above is one larger, so
    that small negative values have zero upper slices as small positive ones do. Every slice fits four signed bits.
    Source: D. Im et al., Energy-efficient Dense DNN Acceleration with Signed Bit-slice Architecture, arXiv 2203.07679,
    and Sibia, HPCA 2023. That a negative value with zero low bits borrows too is our reading of the rule.
    Raises InputError for values that are not integers or do not fit 3 * `slices` + 1 bits.
    """
    given = np.asarray(values)
    _positive("slices", slices)
    if not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"Signed bit-slices are made of integers, not of {given.dtype}; quantise first.")
    limit = 1 << (SLICE_BITS * slices)
    if given.size and (given.min() < -limit or given.max() >= limit):
        raise InputError(
            f"Values from {given.min()} to {given.max()} do not fit {slices} slices ({-limit} to {limit - 1})."
        )
    whole = given.astype(np.int64)
    places = np.arange(slices)
    parts = whole[..., None] >> SLICE_BITS * places
    parts[..., :-1] &= 7
    if slices > 1:
        borrowed = np.full(slices, 1 - 8)
        borrowed[0], borrowed[-1] = -8, 1
        parts += borrowed * (whole < 0)[..., None]
    return parts.astype(np.int8)


def sibia_cycles(
    a: ArrayLike, w: ArrayLike, lanes: int = 4, skip: Literal["auto", "input", "weight"] = "auto"
) -> BitSliceCycles:
    """Sibia: products of signed 4-bit slices (radix 8, three per INT8 operand); zero slices of one operand are skipped.

    `lanes` pairs of one result go together. A vector of `lanes` slices of one order of the skipped operand is left out
    when all are zero; every other one meets the three slices of the other operand in three cycles. At least one cycle
    per group. "auto" skips the operand that saves more, as its sparsity monitor decides. INT8 fills three slices of the
    10-bit format (4, 7, 10, 13 bits are the supported widths).
    Source: D. Im et al., Sibia, HPCA 2023 (abstract) and arXiv 2203.07679; that vectors span four pairs is assumed.
    Raises InputError for bad operands (see `laconic_cycles`), lanes < 1, and another `skip`.
    """
    left, right = _operands(a, w)
    _positive("lanes", lanes)
    if skip not in ("auto", "input", "weight"):
        raise InputError(f'skip is "auto", "input" or "weight", not {skip!r}.')
    macs = _macs(left, right)
    found = [
        _slice_skipping(matrix, repeats, lanes, macs)
        for name, matrix, repeats in (("input", left, right.shape[1]), ("weight", right.T, left.shape[0]))
        if skip in ("auto", name)
    ]
    return min(found, key=lambda cycles: cycles.cycles)


def bitwave_cycles(a: ArrayLike, w: ArrayLike, group: int = 8) -> BitSliceCycles:
    """BitWave: `group` sign-magnitude weights go bit position by bit position; positions without a one are left out.

    A group takes as many cycles as it has bit columns that are not all zero, at least one; the sign column costs no
    cycle. -128, which the 7-bit magnitude of the published design cannot hold, has an eighth column here.
    Source: M. Shi et al., BitWave, HPCA 2024, arXiv 2507.12444; eight operands per PE and the free sign column as in
    Y. Chen et al., BBS, MICRO 2024, arXiv 2409.05227.
    Raises InputError for bad operands (see `laconic_cycles`) and a group below 1.
    """
    left, right = _operands(a, w)
    _positive("group", group)
    bits = _magnitude_bits(right.T, group)
    columns = bits.any(axis=2).sum(axis=-1)
    cycles = int(np.maximum(columns, 1).sum())
    ones = int(bits.sum(dtype=np.int64))
    return BitSliceCycles(cycles * len(left), _macs(left, right), group, ones * len(left))


def serial_digit_cycles(a: ArrayLike, w: ArrayLike, lanes: int = 1, encoding: str = "ent") -> BitSliceCycles:
    """OPT3 and OPT4C (one lane) and OPT4E (four): the non-zero digits of A one after the other.

    Issue cycles of `engine.serial_cycles` in groups of four and one K block; waiting between columns is not counted.
    Source: arXiv 2503.06342, serial non-zero digits (OPT3) and the shared encoder (OPT4C, OPT4E).
    Raises InputError for bad operands (see `laconic_cycles`) and lanes < 1.
    """
    left, right = _operands(a, w)
    _positive("lanes", lanes)
    code, columns = get(encoding), right.shape[1]
    cycles = int(column_cycles(left, code, _BITS, _GROUP, lanes).sum())
    digits = int(np.count_nonzero(code.digits(left, _BITS)))
    return BitSliceCycles(cycles * columns, _macs(left, right), lanes, digits * columns)


def parallel_cycles(a: ArrayLike, w: ArrayLike) -> BitSliceCycles:
    """A parallel multiply-accumulate unit: one cycle per product, whatever the operands.

    Raises InputError for bad operands (see `laconic_cycles`).
    """
    macs = _macs(*_operands(a, w))
    return BitSliceCycles(macs, macs, 1, macs)


def _int8(values: ArrayLike, name: str) -> Int8Matrix:
    array = np.asarray(values)
    if array.dtype != np.int8:
        raise InputError(f"Operand {name} is {array.dtype}; bit-slice engines count on int8, quantise first.")
    return array


def _operands(a: ArrayLike, w: ArrayLike) -> tuple[Int8Matrix, Int8Matrix]:
    left, right = _int8(a, "a"), _int8(w, "w")
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise InputError(f"Operands are matrices (m, k) and (k, n), not {left.shape} and {right.shape}.")
    if not left.size or not right.size:
        raise InputError(f"Operands of shapes {left.shape} and {right.shape} hold nothing to multiply.")
    return left, right


def _positive(name: str, value: int) -> None:
    if not is_whole(value) or value < 1:
        raise InputError(f"{name} is a whole number of at least 1, not {value!r}.")


def _macs(left: Int8Matrix, right: Int8Matrix) -> int:
    return int(left.size) * int(right.shape[1])


def _terms(values: Int8Matrix, encoding: Encoding) -> NDArray[np.uint8]:
    """Non-zero digits of every int8 value, from a table."""
    table = encoding.nonzero_digits(np.arange(-128, 128), _BITS).astype(np.uint8)
    return table[values.astype(np.int16) + 128]


def _grouped(values: NDArray[_Scalar], size: int) -> NDArray[_Scalar]:
    """(rows, k) as (rows, groups, size), the last group filled with zeros."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % size)))
    return padded.reshape(len(values), -1, size)


def _magnitude_bits(values: Int8Matrix, group: int) -> NDArray[np.bool_]:
    """Bits of |values| (rows, k) as (rows, groups, group, 8), the lowest first."""
    magnitude = np.abs(_grouped(values, group).astype(np.int16)).astype(np.uint8)
    bits: NDArray[np.bool_] = np.unpackbits(magnitude[..., None], axis=-1, bitorder="little").astype(bool)
    return bits


def _window_cycles(bits: NDArray[np.bool_], window: int) -> Counts:
    """Cycles of lanes that walk over (..., operands) bits, seeing `window` of them at a time."""
    count = bits.shape[-1]
    lanes = np.pad(bits.reshape(-1, count), ((0, 0), (0, window)))
    position = np.zeros(len(lanes), np.int64)
    cycles = np.zeros(len(lanes), np.int64)
    while (busy := np.flatnonzero(position < count)).size:
        seen = lanes[busy[:, None], position[busy, None] + np.arange(window)]
        ordinal = np.cumsum(seen, axis=1)
        step = np.where(ordinal[:, -1] >= 2, np.argmax(ordinal >= 2, axis=1), window)
        position[busy] += step
        cycles[busy] += 1
    return cycles.reshape(bits.shape[:-1])


def _slice_skipping(skipped: Int8Matrix, repeats: int, lanes: int, macs: int) -> BitSliceCycles:
    """Cycles when the zero slice vectors of `skipped` (rows, k) are left out, `repeats` times."""
    slices = signed_bit_slices(_grouped(skipped, lanes)) != 0  # (rows, groups, lanes, orders)
    orders = slices.shape[-1]
    vectors = slices.any(axis=2).sum(axis=-1)
    cycles = int(np.maximum(vectors * orders, 1).sum())
    return BitSliceCycles(cycles * repeats, macs, lanes, int(slices.sum(dtype=np.int64)) * orders * repeats)
