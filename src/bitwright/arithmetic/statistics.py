"""How many digits of integer data are not zero: what a digit-serial or digit-skipping engine has to work on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.arithmetic.encodings import Encoding
from bitwright.core.errors import InputError


@dataclass(frozen=True)
class DigitStatistics:
    """`shares[d]` is the share of values with d non-zero digits; `mean` their mean number."""

    encoding: str
    shares: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean number of non-zero digits per value."""
        return float(self.shares @ np.arange(len(self.shares)))


def digit_statistics(values: ArrayLike, encoding: Encoding, bits: int = 8) -> DigitStatistics:
    """Distribution of the non-zero digits of integers of any shape; int8 data takes the native kernel.

    Raises InputError for empty data, values that are not integers, and values that do not fit `bits`.
    """
    data = np.asarray(values)
    if data.size == 0:
        raise InputError("Digit statistics need at least one value.")
    count = encoding.digit_count(bits)
    if data.dtype == np.int8 and bits == 8:
        histogram = np.zeros(count + 1, np.int64)
        table = encoding.nonzero_digits(np.arange(-128, 128), 8).astype(np.uint8)
        _native.digit_histogram(np.ascontiguousarray(data).reshape(-1), table, histogram)
    else:
        histogram = np.bincount(encoding.nonzero_digits(data, bits).reshape(-1), minlength=count + 1)
    return DigitStatistics(encoding.name, histogram / data.size)


def from_value_histogram(counts: ArrayLike, encoding: Encoding, bits: int = 8) -> DigitStatistics:
    """The same from how often each value occurs: `counts` (2^bits,), the most negative value first.

    Raises InputError when the histogram has another length or is empty.
    """
    weights = np.asarray(counts, float)
    if weights.shape != (1 << bits,) or not weights.sum() > 0:
        raise InputError(f"A value histogram of {bits}-bit data has {1 << bits} counts, not all zero.")
    values = np.arange(-(1 << (bits - 1)), 1 << (bits - 1))
    digits = encoding.nonzero_digits(values, bits)
    shares = np.bincount(digits, weights, encoding.digit_count(bits) + 1)
    return DigitStatistics(encoding.name, shares / weights.sum())


def issue_cycles(values: ArrayLike, encoding: Encoding, bits: int = 8, group: int = 4) -> float:
    """Mean cycles per operand of a serial engine that issues the non-zero digits of `group` operands at one weight.

    A group without a non-zero digit still takes one cycle. The last axis of `values` is the reduction dimension and
    must be a multiple of `group`. Source: arXiv 2503.06342, serial non-zero digits (OPT3).
    Raises InputError when it is not.
    """
    data = np.asarray(values)
    if data.size == 0 or data.shape[-1] % group:
        raise InputError(f"The last axis must be a multiple of {group} (one group of operands), not {data.shape}.")
    digits = encoding.digits(data, bits) != 0
    per_group = digits.reshape(*data.shape[:-1], data.shape[-1] // group, group, digits.shape[-1]).sum(axis=-2)
    return float(np.maximum(per_group, 1).sum() / data.size)
