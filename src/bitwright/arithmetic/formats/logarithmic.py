"""FP8 codes that are multiplied by adding them: "lmul_e4m3/row", "lmul_e5m2/tensor".

Codes are those of FP8; what differs is their product. L-Mul, adder form: the magnitudes' codes are added, less the bias
and plus 2^-l(m) in the mantissa, and read as a number of the same format: saturating, subnormal operands and results
count as zero. So that products do not saturate, the largest magnitude of a row is mapped to the square root of the
format's largest number. Source: arXiv 2410.00907, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic.formats.elements import FLOATS, FloatElement, Floats, magnitudes


@dataclass(frozen=True)
class LogarithmicElement(FloatElement):
    """An FP8 element whose products are sums of codes."""

    @property
    def operand(self) -> str | None:
        """Its name as an operand of hardware products."""
        return self.name

    def scales(self, rows: Floats) -> Floats:
        """What maps the largest magnitude of every row (groups, size) to the root of the largest value, (groups,)."""
        return magnitudes(rows) / np.float32(self.largest**0.5)

    @property
    def adder_offset(self) -> int:
        """What a sum of two magnitude codes has too much: the bias, less 2^-l(m) with l(m) = m up to three bits."""
        return (self.bias << self.mantissa_bits) - 1

    @property
    def largest_code(self) -> int:
        """The magnitude code of the largest number."""
        return int(np.flatnonzero(self.integers[: 1 << (self.bits - 1)] * self.unit == self.largest)[0])

    @cached_property
    def sums(self) -> NDArray[np.int64]:
        """Products of all pairs of codes in units of `unit`, (256, 256)."""
        codes = np.arange(1 << self.bits)
        magnitude = codes & ((1 << (self.bits - 1)) - 1)
        added = magnitude[:, None] + magnitude[None, :] - self.adder_offset
        least = 1 << self.mantissa_bits
        flushed = (magnitude[:, None] < least) | (magnitude[None, :] < least) | (added < least)
        found = np.where(flushed, 0, self.integers[np.clip(added, 0, self.largest_code)])
        sign = (codes[:, None] ^ codes[None, :]) >> (self.bits - 1)
        return np.asarray(np.where(sign == 1, -found, found), np.int64)

    @cached_property
    def products(self) -> NDArray[np.int64]:
        """The same in units of `unit` squared, those of exact products of codes."""
        return self.sums * round(1 / self.unit)


LOGARITHMIC = {
    f"lmul_{name[4:]}": LogarithmicElement(
        f"lmul_{name[4:]}", FLOATS[name].exponent_bits, FLOATS[name].mantissa_bits, FLOATS[name].bias,
        FLOATS[name].largest,
    )
    for name in ("fp8_e4m3", "fp8_e5m2")
}  # fmt: skip
