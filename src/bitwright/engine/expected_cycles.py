"""Expected cycles of digit-serial arrays from an operand's profile: no tensor needed, thousands of layers per second.

Same hardware as `engine.serial_cycles`. Under the profile's distribution the issue cycles of a lane in a pass are a sum
of independent groups, so their distribution is a convolution power; lanes that join take the maximum, bit weights add
up, columns that join take the maximum again: exact for independent digits. Real operands differ from that in how far
columns spread: digits of one value depend on each other, so the spread about the mean is scaled to the variance that
the profile measured; whole rows are slow or fast, so columns are drawn from a mixture over the measured row effects.

Source: the synchronisation of arXiv 2503.06342; the order statistics are elementary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from bitwright.core.errors import InputError
from bitwright.core.quantity import is_whole
from bitwright.engine.digit_profiles import OperandProfile, binomial

Floats = NDArray[np.float64]
_GRID = 1024


@dataclass(frozen=True)
class ExpectedCycles:
    """Expected cycles of C (m, n) = A (m, k) @ B (k, n) on a serial array, A encoded.

    `cycles` is the whole product with overheads. `slowest_column`, `fastest_column`, `average_column`: issue cycles of
    the busiest, least busy and mean column of each tile, summed over the tiles (only columns that hold a row).
    `sync_utilisation` = average / slowest; `utilisation`: share of the lane slots of all elements and cycles in which a
    group is issued for a wanted result; idle columns and rows, waiting lanes and overheads are lost.
    """

    cycles: float
    slowest_column: float
    fastest_column: float
    average_column: float
    utilisation: float

    @property
    def sync_utilisation(self) -> float:
        """Share of synchronised cycles in which the average column issues."""
        return min(1.0, self.average_column / self.slowest_column)


@lru_cache(maxsize=4096)
def block_cycles(profile: OperandProfile, k: int, lanes: int, columns: int) -> tuple[float, float, float, float]:
    """(mean, slowest, fastest, stream) expected issue cycles of `columns` columns in one K block of length `k`.

    Mean over columns, maximum and minimum of the columns, and the mean of a single digit stream, which does not wait
    for the other lanes. Raises InputError for sizes below 1.
    """
    for name, value in (("k", k), ("lanes", lanes), ("columns", columns)):
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} is a whole number of at least 1, not {value!r}.")
    group, steps = profile.group, -(-k // (profile.group * lanes))
    full, rest = divmod(k, group)
    length = fft.next_fast_len(steps * (group - 1) * len(profile.shares) + 1, real=True)
    total, stream = np.ones(length // 2 + 1, np.complex128), 0.0
    for shares in profile.table:
        chance = float(shares @ np.arange(group + 1)) / group
        whole = _spectrum(shares, length)
        partial = _spectrum(np.append(binomial(rest, chance), np.zeros(group - rest)), length) if rest else None
        below = np.ones(length)
        kinds: dict[tuple[int, bool], int] = {}
        for lane in range(lanes):  # groups go round: the first lanes hold one more
            kind = (full // lanes + (lane < full % lanes), rest > 0 and lane == full % lanes)
            kinds[kind] = kinds.get(kind, 0) + 1
        for (groups, holds_rest), count in kinds.items():
            spectrum = whole**groups
            if holds_rest and partial is not None:
                spectrum = spectrum * partial
            share = _distribution(spectrum, length)
            stream += count * float(share @ np.arange(length)) / lanes
            below *= np.minimum(np.cumsum(share), 1.0) ** count
        total *= fft.rfft(np.diff(below, prepend=0.0))
    idle = float(steps * len(profile.shares))  # one cycle per group whatever it holds
    column = _distribution(total, length)
    places = np.arange(length)
    mean = float(column @ places)
    spread = float(column @ (places - mean) ** 2)
    below = np.minimum(np.cumsum(column), 1.0)
    above = np.maximum(1.0 - below, 0.0)
    slowest = float((1.0 - below**columns).sum())
    fastest = float((above**columns).sum())
    independent = float((profile.weight_deviations**2).sum())
    scale = math.sqrt(profile.group_variance / independent) if independent else 0.0
    slowest, fastest = mean + scale * (slowest - mean), mean + scale * (fastest - mean)
    if profile.row_effects:
        shifts = steps * np.asarray(profile.row_effects)
        slowest, fastest = _extremes(below, mean, math.sqrt(max(spread, 0.0)), scale, shifts, columns)
    least, most = idle, idle * group
    return (
        idle + mean,
        min(most, idle + slowest),
        max(least, idle + fastest),
        idle + stream,
    )


def expected_array_cycles(
    profile: OperandProfile, m: int, n: int, k: int, columns: int, rows: int, lanes: int = 1, block: int | None = None,
    pass_overhead: float = 0, tile_overhead: float = 0,
) -> ExpectedCycles:  # fmt: skip
    """Expected cycles of A (m, k) @ B (k, n), A distributed as `profile`; arguments as `serial_cycles.array_cycles`.

    Raises InputError for sizes below 1 and negative overheads.
    """
    for name, value in (("m", m), ("n", n), ("k", k), ("columns", columns), ("rows", rows), ("lanes", lanes)):
        if not is_whole(value) or value < 1:
            raise InputError(f"{name} is a whole number of at least 1, not {value!r}.")
    if block is not None and block < 1:
        raise InputError(f"A K block has a length of at least 1, not {block}.")
    if min(pass_overhead, tile_overhead) < 0:
        raise InputError(f"Overheads are 0 or more cycles, not {pass_overhead} per pass and {tile_overhead} per tile.")
    step = profile.group * lanes
    length = min(k, max(1, block // step) * step) if block is not None else k
    blocks = [(length, k // length)] + ([(k % length, 1)] if k % length else [])
    tiles = [(columns, m // columns)] if m >= columns else []
    tiles += [(m % columns, 1)] if m % columns else []
    row_tiles = -(-n // rows)
    slowest = fastest = average = streams = 0.0
    for held, tile_count in tiles:
        for size, block_count in blocks:
            mean, most, least, stream = block_cycles(profile, size, lanes, held)
            count = tile_count * block_count * row_tiles
            slowest, fastest, average = slowest + count * most, fastest + count * least, average + count * mean
            streams += count * stream * held
    passes = len(profile.shares) * sum(count for _, count in blocks)
    tile_count = sum(count for _, count in tiles) * row_tiles
    cycles = slowest + tile_count * (passes * pass_overhead + tile_overhead)
    useful = streams * n / (row_tiles * rows)
    return ExpectedCycles(cycles, slowest, fastest, average, useful / (cycles * columns))


def _extremes(
    below: Floats, mean: float, deviation: float, scale: float, shifts: Floats, columns: int
) -> tuple[float, float]:
    """Expected maximum and minimum of `columns` draws: a cumulative distribution, stretched, shifted per row."""
    scale = max(scale, 1e-6)
    reach = 8 * deviation * scale + 1e-6
    grid = np.linspace(mean - reach + shifts.min(), mean + reach + shifts.max(), _GRID)
    at = mean + (grid - mean - shifts[:, None]) / scale
    mixed = np.interp(at, np.arange(len(below)) + 0.5, below, left=0.0, right=1.0).mean(axis=0)
    step = grid[1] - grid[0]
    slowest = grid[-1] - step * float((mixed**columns)[:-1].sum())
    fastest = grid[0] + step * float(((1 - mixed) ** columns)[:-1].sum())
    return float(slowest), float(fastest)


def _spectrum(shares: Floats, length: int) -> NDArray[np.complex128]:
    """Transform of the cycles beyond one that a group takes: shares of 0, 1, 2, .. digits."""
    beyond = np.append(shares[0] + shares[1], shares[2:])
    return np.asarray(fft.rfft(beyond, length))


def _distribution(spectrum: NDArray[np.complex128], length: int) -> Floats:
    shares = np.maximum(fft.irfft(spectrum, length), 0.0)
    return np.asarray(shares / shares.sum())
