"""Where a digit-serial engine keeps its encoded operand, so that columns that drift apart do not meet in a bank.

A (m, k) is stored as (K1, MT, K2, MP): K is cut into K1 = `columns` runs of K2 = K / K1 consecutive positions, each run
in a bank of its own. Column j starts its walk through K in bank j and goes round (sums over K may be taken in any
order), so that columns stay in different banks as long as none is ahead of its neighbour by a whole run.

Source: arXiv 2503.06342, operand layout of the serial engines; the count of conflicts is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.encodings import Encoding
from bitwright.core.errors import InputError


@dataclass(frozen=True)
class BankConflicts:
    """Group fetches of all columns over one tile, and how many found their bank taken in the same cycle."""

    fetches: int
    conflicts: int

    @property
    def share(self) -> float:
        """Conflicts per fetch."""
        return self.conflicts / self.fetches


def bank_address(m: ArrayLike, k: ArrayLike, depth: int, columns: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bank and address of element (m, k) of an operand with `depth` positions of K; element-wise.

    Raises InputError when K is not a multiple of the number of banks, or an index lies outside.
    """
    row, position = np.asarray(m, np.int64), np.asarray(k, np.int64)
    if columns < 1 or depth % columns:
        raise InputError(f"K = {depth} is not a multiple of {columns} banks; pad it with zeros.")
    if (row < 0).any() or (position < 0).any() or (position >= depth).any():
        raise InputError(f"Operand positions must be in 0..{depth - 1}, rows at least 0.")
    run = depth // columns
    bank, within = np.divmod(position, run)
    tile, column = np.divmod(row, columns)
    return bank, (tile * run + within) * columns + column


def bank_conflicts(
    a: ArrayLike, encoding: Encoding, bits: int = 8, group: int = 4, staggered: bool = True
) -> BankConflicts:
    """Conflicts while one tile, a row of `a` (columns, k) per column, runs through its bit weights.

    `staggered` starts column j in bank j; without it all start in bank 0. K must be a multiple of columns * group.
    Raises InputError when it is not.
    """
    values = np.asarray(a)
    if values.ndim != 2 or not values.size or values.shape[1] % (values.shape[0] * group):
        raise InputError(f"Expected operands (columns, k) with k a multiple of columns * {group}, got {values.shape}.")
    columns, depth = values.shape
    flags = encoding.digits(values, bits) != 0
    taken = np.maximum(1, flags.reshape(columns, depth // group, group, -1).sum(2)).transpose(0, 2, 1)
    run = depth // columns // group
    banks = np.repeat(np.arange(columns), run)
    times, wanted = [], []
    for column in range(columns):
        start = column * run if staggered else 0
        order = np.roll(np.arange(depth // group), -start)
        # One pass per bit weight, one after the other; every fetch happens when the group before has been issued.
        lengths = taken[column][:, order].reshape(-1)
        times.append(np.cumsum(lengths) - lengths)
        wanted.append(np.tile(banks[order], taken.shape[1]))
    key = np.concatenate(times) * columns + np.concatenate(wanted)
    _, counts = np.unique(key, return_counts=True)
    return BankConflicts(key.size, int((counts - 1).sum()))
