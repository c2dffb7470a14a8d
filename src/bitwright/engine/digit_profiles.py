"""What a digit-serial engine needs to know of an operand: issue cycles of its groups, and how rows differ.

A profile is measured on a real tensor, or derived from a value distribution. It is enough to predict the cycles of a
product of any size whose operand is distributed alike (`engine.expected_cycles`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright.arithmetic.encodings import Encoding, get
from bitwright.core.errors import InputError
from bitwright.engine.serial_cycles import stream_cycles

Floats = NDArray[np.float64]
_ROW_EFFECTS = 64


@dataclass(frozen=True)
class OperandProfile:
    """Digits of an operand (rows, k) under an encoding, in groups of `group` consecutive k.

    `origin` names the data. `shares` (bit weights, group + 1): share of groups with 0, 1, .. non-zero digits at a bit
    weight. `group_variance`: variance over rows of the issue cycles of a group (all its bit weights together), for
    groups at the same place of k. `row_effects`: equally likely deviations of a row's mean cycles per group beyond what
    the groups' own variance explains (rows of large values are slow in all their groups); empty when rows are alike.
    Raises InputError for shares that are not a distribution per bit weight.
    """

    origin: str
    encoding: str
    bits: int
    group: int
    shares: tuple[tuple[float, ...], ...]
    group_variance: float
    row_effects: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        table = self.table
        expected = (get(self.encoding).digit_count(self.bits), self.group + 1)
        if table.shape != expected or table.min() < 0 or not np.allclose(table.sum(axis=1), 1.0, atol=1e-6):
            raise InputError(
                f"Profile {self.origin!r}: shares of shape {table.shape} are not one distribution over 0 to "
                f"{self.group} digits for each of {expected[0]} bit weights."
            )
        if not self.group_variance >= 0 or not np.isfinite(self.row_effects).all():
            raise InputError(f"Profile {self.origin!r}: a variance is negative, or a row's effect is not a number.")

    @property
    def table(self) -> Floats:
        """`shares` as an array (bit weights, group + 1)."""
        return np.asarray(self.shares, np.float64)

    @property
    def digits(self) -> float:
        """Mean non-zero digits per operand."""
        return float((self.table @ np.arange(self.group + 1)).sum() / self.group)

    @property
    def issue_cycles(self) -> float:
        """Mean issue cycles per operand: all-zero groups take one cycle."""
        return self.digits + float(self.table[:, 0].sum() / self.group)

    @property
    def weight_means(self) -> Floats:
        """Mean issue cycles of a group, per bit weight."""
        return np.asarray(self.table @ np.maximum(np.arange(self.group + 1), 1.0))

    @property
    def weight_deviations(self) -> Floats:
        """Standard deviation of the issue cycles of a group, per bit weight."""
        cycles = np.maximum(np.arange(self.group + 1), 1.0)
        return np.asarray(np.sqrt(np.maximum(self.table @ cycles**2 - self.weight_means**2, 0.0)))

    @property
    def row_variance(self) -> float:
        """Variance of `row_effects`."""
        return float(np.var(self.row_effects)) if self.row_effects else 0.0

    @property
    def operand_deviation(self) -> float:
        """Standard deviation of issue cycles per operand, as if groups were `group` independent operands."""
        return math.sqrt(self.group_variance / self.group)

    def to_json(self) -> dict[str, Any]:
        """JSON values, read back by `profile_from_json`."""
        return {
            "origin": self.origin, "encoding": self.encoding, "bits": self.bits, "group": self.group,
            "shares": [list(row) for row in self.shares], "group_variance": self.group_variance,
            "row_effects": list(self.row_effects),
        }  # fmt: skip


def profile_from_json(stored: Mapping[str, Any]) -> OperandProfile:
    """The profile that `to_json` wrote. Raises InputError for anything else."""
    try:
        return OperandProfile(
            str(stored["origin"]), str(stored["encoding"]), int(stored["bits"]), int(stored["group"]),
            tuple(tuple(float(share) for share in row) for row in stored["shares"]),
            float(stored["group_variance"]), tuple(float(effect) for effect in stored["row_effects"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"Not a stored operand profile: {error!r}.") from None


def measure_profile(
    operand: ArrayLike, encoding: str | Encoding = "ent", bits: int = 8, group: int = 4, origin: str = "given tensor"
) -> OperandProfile:
    """Profile of an operand (rows, k): one row of the array's product per row, k the reduction dimension.

    An incomplete last group is left out unless it is the only one. Raises InputError as `stream_cycles` does.
    """
    code = get(encoding) if isinstance(encoding, str) else encoding
    values = np.asarray(operand)
    if values.ndim == 2 and values.shape[1] > group:
        values = values[:, : values.shape[1] // group * group]
    # one block per group: (rows, groups, bit weights)
    digits = stream_cycles(values, code, bits, group, 1, group, idle_cycle=False)[:, :, 0]
    rows, groups, weights = digits.shape
    counts = np.stack([np.bincount(digits[..., weight].reshape(-1), minlength=group + 1) for weight in range(weights)])
    cycles = np.maximum(digits, 1).sum(axis=2).astype(np.float64)
    within, effects = 0.0, np.zeros(0)
    if rows > 1:
        centred = cycles - cycles.mean(axis=0)  # what all rows share at a place of k delays no row more than another
        row_means = centred.mean(axis=1)
        total = float((row_means**2).sum() / (rows - 1))
        if groups == 1:
            within = total
        else:
            within = float(((centred - row_means[:, None]) ** 2).sum() / ((rows - 1) * (groups - 1)))
            between = max(0.0, total - within / groups)
            if between > 0:
                count = min(rows, _ROW_EFFECTS)
                effects = np.quantile(row_means, (np.arange(count) + 0.5) / count)
                effects = (effects - effects.mean()) * math.sqrt(between / max(float(effects.var()), 1e-300))
    shares = counts / (rows * groups)
    return OperandProfile(
        origin, code.name, bits, group, tuple(map(tuple, shares.tolist())), within, tuple(effects.tolist())
    )  # fmt: skip


def distribution_profile(
    weights: ArrayLike, encoding: str | Encoding = "ent", bits: int = 8, group: int = 4,
    origin: str = "independent values",
) -> OperandProfile:  # fmt: skip
    """Profile of independent values: `weights` (2^bits,) say how often each occurs, the most negative first. Exact.

    Raises InputError for another length, negative or all-zero weights.
    """
    code = get(encoding) if isinstance(encoding, str) else encoding
    likelihood = np.asarray(weights, np.float64)
    if likelihood.shape != (1 << bits,) or likelihood.min() < 0 or not likelihood.sum() > 0:
        raise InputError(f"A distribution of {bits}-bit values has {1 << bits} weights, none negative, not all zero.")
    likelihood = likelihood / likelihood.sum()
    low = 1 << (bits - 1)
    flags = (code.digits(np.arange(-low, low), bits) != 0).astype(np.float64)
    single = likelihood @ flags
    shares = np.stack([binomial(group, float(chance)) for chance in single])
    cycles = np.maximum(np.arange(group + 1), 1.0)
    means = shares @ cycles
    variance = float((shares @ cycles**2 - means**2).sum())
    both = flags.T @ (flags * likelihood[:, None])
    for first in range(len(single)):
        for second in range(first):
            joint = _joint_counts(both[first, second], single[first], single[second], group)
            variance += 2 * float(cycles @ joint @ cycles - means[first] * means[second])
    return OperandProfile(origin, code.name, bits, group, tuple(map(tuple, shares.tolist())), max(variance, 0.0))


def normal_profile(
    sigma: float | None = None, encoding: str | Encoding = "ent", bits: int = 8, group: int = 4, samples: int = 1 << 20
) -> OperandProfile:
    """Profile of normal data, rounded to integers of `bits` bits. Exact, nothing is drawn.

    `sigma` is the deviation of the integers. None: the largest of `samples` values is mapped to the largest code, so
    sigma = (2^(bits-1) - 1) / E[max |x|], E[max] taken at its median. Raises InputError for a sigma that is not
    positive.
    """
    from scipy.stats import norm

    most = (1 << (bits - 1)) - 1
    named = f"normal data, sigma {sigma:g}" if sigma is not None else f"normal data, largest of {samples} at {most}"
    if sigma is None:
        sigma = most / float(norm.isf(-math.expm1(math.log(0.5) / samples) / 2))
    if not 0 < sigma < math.inf:
        raise InputError(f"The deviation of normal data is positive and finite, not {sigma}.")
    edges = np.arange(-most, most) + 0.5
    below = np.concatenate([[0.0], norm.cdf(edges / sigma), [1.0]])
    chances = np.concatenate([[0.0], np.diff(below)])  # the most negative code is not used
    return distribution_profile(chances, encoding, bits, group, named)


def binomial(count: int, chance: float) -> Floats:
    """Distribution (count + 1,) of how many of `count` independent digits are not zero."""
    table = np.array([math.comb(count, hits) for hits in range(count + 1)], np.float64)
    hits = np.arange(count + 1)
    return np.asarray(table * chance**hits * (1 - chance) ** (count - hits))


def _joint_counts(both: float, first: float, second: float, group: int) -> Floats:
    """Joint distribution (group + 1, group + 1) of the non-zero digits at two bit weights of `group` values."""
    cell = np.array([[1 - first - second + both, second - both], [first - both, both]])
    joint = np.ones((1, 1))
    for _ in range(group):
        grown = np.zeros((len(joint) + 1, len(joint) + 1))
        for row in (0, 1):
            for column in (0, 1):
                grown[row : row + len(joint), column : column + len(joint)] += cell[row, column] * joint
        joint = grown
    return joint
