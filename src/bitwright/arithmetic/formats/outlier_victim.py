"""Outlier-victim pairs: dense 4- or 8-bit codes in which an outlier takes the place of its neighbour (OliVe).

Neighbours along the last axis form pairs. Where neither is an outlier, both are integers of +-(2^(bits-1) - 1). An
outlier is stored as a biased float ("abfloat") in its own slot; the other slot, the victim, holds the identifier
2^(bits-1), reads as zero, and says what its neighbour is. Of two outliers the larger survives (`keep="left"`: the left
one, as in the released code). A value is an outlier when the nearest value of both grids together is an outlier's.

abfloat: a sign, two exponent bits e and bits - 3 mantissa bits m, (1.m) << (e + 2) counted from the top of the
integers, in their units: +-12 to 96 for 4 bits, +-132 to 2016 for 8 bits (the lowest code is not used). The paper has
four exponent bits for 8-bit codes, whose products leave 32 bits; the released code has two.

Source: arXiv 2304.07493 (ISCA 2023), sections on pair encoding and abfloat; the scale search is that of the released
quantiser, 75 to 250 percent of |mean| + 3 deviations in steps of 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic.formats import base
from bitwright.arithmetic.formats.base import Array, Encoded, Granularity
from bitwright.core.errors import InputError

Keep = Literal["larger", "left"]
SEARCH = (75, 250, 2)  # first, last and step of the scales tried, percent
_SEARCHED_VALUES = 4096  # of a row at most; a tensor's scale is searched on 64 times as many


@dataclass(frozen=True)
class OutlierVictimPairs:
    """Pairs of `bits`-bit codes, one scale per tensor, row or group (of an even size), found by least squares.

    Raises InputError for other than 4 or 8 bits, odd groups, and no scale.
    """

    bits: int = 4
    granularity: Granularity = "row"
    keep: Keep = "larger"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"Outlier-victim pairs have codes of 4 or 8 bits, not {self.bits}.")
        if self.granularity == "none" or (isinstance(self.granularity, int) and self.granularity % 2):
            raise InputError(f"Outlier-victim pairs need scales, over groups of even size; not {self.granularity!r}.")
        if self.keep not in ("larger", "left"):
            raise InputError(f"Of two outliers the larger or the left one is kept, not {self.keep!r}.")

    @property
    def name(self) -> str:
        """For example "ovp4/row"."""
        return f"ovp{self.bits}/{self.granularity}"

    @property
    def code_bits(self) -> int:
        """Bits of a slot."""
        return self.bits

    @property
    def operand(self) -> str | None:
        """Decoded pairs of 4 bits as exponent and integer; pairs of 8 bits take four such products."""
        return "ovp4" if self.bits == 4 else None

    @property
    def identifier(self) -> int:
        """The code of a victim."""
        return 1 << (self.bits - 1)

    @cached_property
    def outliers(self) -> NDArray[np.int64]:
        """What the code of an outlier means, (2^bits,); 0 for codes that are not used."""
        codes = np.arange(1 << self.bits)
        magnitude = codes & (self.identifier - 1)
        mantissa_bits = self.bits - 3
        exponent, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
        value = np.where(magnitude == 0, 0, ((1 << mantissa_bits) + mantissa) << (exponent + 2))
        return np.where(codes >= self.identifier, -value, value).astype(np.int64)

    @cached_property
    def _grid(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]:
        """Magnitudes of outliers, where one rounds up to the next (the first: from integers), and their codes."""
        positive = np.flatnonzero(self.outliers > 0)
        order = positive[np.argsort(self.outliers[positive])]
        values = self.outliers[order].astype(np.float32)
        before = np.concatenate([[np.float32(self.identifier - 1)], values[:-1]])
        return values, ((before + values) / 2).astype(np.float32), order.astype(np.uint8)

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Codes, an odd tail filled up, and float32 scales."""
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        size = self._padded(shape[-1])
        stored = rows * size * self.bits + 32 * base.scale_count((*shape[:-1], size), self.granularity)
        return stored / int(np.prod(shape, dtype=np.int64))

    def _padded(self, k: int) -> int:
        step = self.granularity if isinstance(self.granularity, int) else 2
        return -(-k // step) * step

    def encode(self, x: Array, scale: NDArray[np.float32] | None = None) -> Encoded:
        """Codes of x (..., k), with a known `scale` of the shape that `Encoded.scale` has, or the best of the search.

        Raises InputError for NaN, infinities, and scales that are not positive.
        """
        real = base.finite(x, self.name)
        missing = self._padded(real.shape[-1]) - real.shape[-1]
        filled = np.pad(real, [(0, 0)] * (real.ndim - 1) + [(0, missing)]) if missing else real
        grouped = base.groups_of(filled, self.granularity, self.name)
        rows = grouped.reshape(-1, grouped.shape[-1])
        if scale is None:
            flat = self.search(rows)
        else:
            flat = np.asarray(scale, np.float32).reshape(-1)
            if flat.size != len(rows) or not (flat > 0).all():
                raise InputError(f"{self.name}: expected {len(rows)} positive scales, got {flat.size}.")
        codes = self._codes(rows, flat)
        single = self.granularity == "tensor"
        return Encoded(codes.reshape(filled.shape), flat.reshape(()) if single else flat.reshape(grouped.shape[:-1]),
                       None, real.shape)  # fmt: skip

    def search(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scale of least squared error for every row (rows, size), of the candidates of `SEARCH`.

        Long rows are searched on evenly spaced pairs.
        """
        most = _SEARCHED_VALUES * (64 if len(rows) == 1 else 1)
        if rows.shape[1] > most:
            picked = np.linspace(0, rows.shape[1] // 2 - 1, most // 2).astype(int)
            rows = np.ascontiguousarray(rows.reshape(len(rows), -1, 2)[:, picked].reshape(len(rows), -1))
        mean, deviation = rows.mean(axis=1, dtype=np.float64), rows.std(axis=1, dtype=np.float64)
        base_value = np.abs(mean) + 3 * deviation
        base_value = np.where(base_value > 0, base_value, 1.0) / (self.identifier - 1)
        best, found = np.full(len(rows), np.inf), base_value.astype(np.float32)
        for percent in range(*SEARCH):
            scale = np.maximum(base_value * percent / 100, np.finfo(np.float32).tiny).astype(np.float32)
            values = self._values(self._codes(rows, scale)) * scale[:, None]
            error = np.square(values - rows, dtype=np.float32).sum(axis=1, dtype=np.float64)
            better = error < best
            best[better], found[better] = error[better], scale[better]
        return found

    def _codes(self, rows: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
        scaled = rows / scale[:, None]
        magnitude = np.abs(scaled)
        _, edges, codes = self._grid
        outlier = magnitude > edges[0]
        top = np.float32(self.identifier - 1)
        integers = np.clip(np.rint(scaled), -top, top).astype(np.int16)
        made: NDArray[np.uint8] = (integers & (2 * self.identifier - 1)).astype(np.uint8)
        if not outlier.any():
            return made
        left, right = outlier[:, 0::2], outlier[:, 1::2]
        wins = magnitude[:, 1::2] > magnitude[:, 0::2] if self.keep == "larger" else False
        right = right & (~left | wins)
        left = left & ~right
        kept = np.empty_like(outlier)
        kept[:, 0::2], kept[:, 1::2] = left, right
        place = np.searchsorted(edges, magnitude[kept], side="left") - 1  # ties go to the smaller outlier
        made[kept] = codes[place] | np.where(scaled[kept] < 0, self.identifier, 0).astype(np.uint8)
        made[:, 1::2][left] = self.identifier
        made[:, 0::2][right] = self.identifier
        return made

    def _values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.integers(codes).astype(np.float32)

    def integers(self, codes: NDArray[Any]) -> NDArray[np.int64]:
        """Values of codes (..., even k) in units of the integers; 0 for victims. Raises InputError for two victims."""
        half = self.identifier
        victim = codes == half
        partner = victim.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
        if (victim & partner).any():
            raise InputError(f"{self.name}: a pair holds two victims, which no encoder makes.")
        normal = (codes.astype(np.int64) ^ half) - half
        return np.where(victim, 0, np.where(partner, self.outliers[codes], normal))

    def operand_words(self, encoded: Encoded) -> NDArray[np.int64]:
        """What the decoder of 4-bit pairs emits for every code: exponent (3 bits) and signed integer (4 bits)."""
        if self.bits != 4:
            raise InputError("Only pairs of 4 bits have exponent-integer words; 8 bits take four products of them.")
        codes = encoded.codes
        victim = codes == self.identifier
        partner = victim.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
        exponent = np.where(partner, ((codes & 7) >> 1) + 2, 0)
        magnitude = 2 + (codes & 1).astype(np.int64)
        integer = np.where(partner, np.where(codes >= 8, -magnitude, magnitude), (codes.astype(np.int64) ^ 8) - 8)
        word = (exponent.astype(np.int64) << 4) | (np.where(victim, 0, integer) & 15)
        word = np.where(victim, 0, word)
        return np.asarray((word ^ 64) - 64)

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """Integers times their scales."""
        return base.decode_integers(self.integers(encoded.codes), encoded)

    def pack(self, encoded: Encoded) -> NDArray[np.uint8]:
        """Codes, two of 4 bits in a byte, then scales."""
        return np.concatenate(
            [base.pack_codes(encoded.codes, self.bits), encoded.scale.astype(np.float32).reshape(-1).view(np.uint8)]
        )

    def unpack(self, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> Encoded:
        """The inverse of `pack`. Raises InputError for another number of bytes and pairs of two victims."""
        rows, size = int(np.prod(shape[:-1], dtype=np.int64)), self._padded(shape[-1])
        scales = base.scale_count((*shape[:-1], size), self.granularity)
        code_bytes = rows * size * self.bits // 8
        if packed.size != code_bytes + 4 * scales:
            raise InputError(f"{self.name} {shape} is {code_bytes + 4 * scales} bytes, not {packed.size}.")
        codes = base.unpack_codes(packed[:code_bytes], self.bits, rows * size).astype(np.uint8)
        codes = codes.reshape(*shape[:-1], size)
        self.integers(codes)
        scale = np.frombuffer(packed[code_bytes:].tobytes(), np.float32)
        single = self.granularity == "tensor"
        return Encoded(codes, scale.reshape(()) if single else scale.reshape(*shape[:-1], scales // max(1, rows)), None,
                       shape)  # fmt: skip


@dataclass(frozen=True)
class PairStatistics:
    """Shares (%) of pairs without, with one, and with two outliers, and the largest value in deviations."""

    normal_normal: float
    outlier_normal: float
    outlier_outlier: float
    largest_sigma: float


def pair_statistics(x: Array, sigma: float = 3.0) -> PairStatistics:
    """How outliers beyond `sigma` deviations from the mean fall into pairs of neighbours; an odd tail is left out."""
    real = base.finite(x, "Pair statistics").reshape(-1).astype(np.float64)
    distance = np.abs(real - real.mean()) / (real.std() or 1.0)
    pairs = (distance[: real.size // 2 * 2] > sigma).reshape(-1, 2).sum(axis=1)
    shares = np.bincount(pairs, minlength=3) / max(1, len(pairs)) * 100
    return PairStatistics(float(shares[0]), float(shares[1]), float(shares[2]), float(distance.max()))
