"""Outlier-victim pairs: dense 4- or 8-bit codes in which an outlier takes the place of its neighbour (OliVe).

Neighbours along the last axis form pairs. Where neither is an outlier, both are normal values: integers of
+-(2^(bits-1) - 1), or for 4 bits flint, +-{0, 1, 2, 3, 4, 6, 8, 16}. An outlier is stored as a biased float ("abfloat")
in its own slot; the other slot, the victim, holds the identifier 2^(bits-1), reads as zero, and says what its neighbour
is. Of two outliers the larger survives (`keep="left"`: the left one, as in the released code). A value is an outlier
when the nearest value of both grids together is an outlier's; ties go to the smaller magnitude, between integers to
the even one.

Tensors that are never negative (after ReLU or softmax) may use the sign bit for another one of the value: normal values
are 0 to 2^bits - 2, the identifier is 2^bits - 1, negative values become 0, and outliers have one mantissa bit more.

abfloat: a sign, e exponent bits and m mantissa bits, (2^m + mantissa) << (exponent + bias) in units of the normal
values. The lowest code is not used. The bias is the smallest one that leaves all others beyond the normal values: +-12
to 96 beside 4-bit integers, +-24 to 192 beside flint, +-132 to 2016 (e2m5, as in the released code) or +-144 to 2^15
(e4m3, as in the paper; cut there, so that a product of two fits 32 bits) beside 8-bit integers; 20 to 192 and 260 to
4032 (e2) beside unsigned integers, whose highest code would be an identifier.

A decoder emits pairs <exponent, integer>, whose products are <a + c, b * d>; 8-bit codes are two such pairs, <4 + e, h>
and <e, l> with 4-bit h and l, so that four products of 4 bits make one of 8.

Source: arXiv 2304.07493 (ISCA 2023), sections on pair encoding and abfloat; the scale search is that of the released
quantiser, 75 to 250 percent of |mean| + 3 deviations in steps of 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.arithmetic.formats import base
from bitwright.arithmetic.formats.base import Array, Encoded, Granularity
from bitwright.core.errors import InputError

Keep = Literal["larger", "left"]
Normal = Literal["int", "flint"]
SEARCH = (75, 250, 2)  # first, last and step of the scales tried, percent
LARGEST = 1 << 15  # of an outlier, in units of the normal values
_UNREACHED = 100  # a bias that puts outliers beyond every value, for integers without outliers
_FLINT = (0, 1, 2, 3, 16, 8, 4, 6)  # what the 3-bit codes of flint mean


@dataclass(frozen=True)
class OutlierVictimPairs:
    """Pairs of `bits`-bit codes, one scale per tensor, row or group (of an even size), found by least squares.

    `exponent_bits` and `bias` are those of outliers (None: see the module). An odd last axis is filled up with a zero,
    unless `pad` is false. `search_percent` are the scales tried, as in `range`. Not `signed`, negative values become 0.
    Raises InputError for other than 4 or 8 bits, odd groups, no scale, flint of 8 bits or without a sign (its values
    take all 16 codes), exponents without a mantissa, an empty search, and biases that put outliers among the normal
    values or beyond `LARGEST`.
    """

    bits: int = 4
    granularity: Granularity = "row"
    keep: Keep = "larger"
    normal: Normal = "int"
    exponent_bits: int = 2
    bias: int | None = None
    pad: bool = True
    search_percent: tuple[int, int, int] = SEARCH
    signed: bool = True

    def __post_init__(self) -> None:
        base.check_granularity(self.granularity, f"ovp{self.bits}")
        if self.bits not in (4, 8):
            raise InputError(f"Outlier-victim pairs have codes of 4 or 8 bits, not {self.bits}.")
        if self.granularity == "none" or (isinstance(self.granularity, int) and self.granularity % 2):
            raise InputError(f"Outlier-victim pairs need scales, over groups of even size; not {self.granularity!r}.")
        if self.keep not in ("larger", "left"):
            raise InputError(f"Of two outliers the larger or the left one is kept, not {self.keep!r}.")
        flint = self.bits == 4 and self.signed
        if self.normal not in ("int", "flint") or (self.normal == "flint" and not flint):
            raise InputError(f"Normal values of {self.bits} bits{'' if self.signed else ' without a sign'} are int"
                             f"{' or flint' * flint}, not {self.normal!r}.")  # fmt: skip
        most = min(4, self.bits - 2)
        if not 1 <= self.exponent_bits <= most:
            raise InputError(f"Outliers of {self.bits} bits have 1 to {most} exponent bits, not {self.exponent_bits}.")
        if not self.search_percent[0] > 0 or not range(*self.search_percent):
            raise InputError(f"A search over {self.search_percent} percent; expected first > 0, last, step.")
        smallest = (1 << self.mantissa_bits) + 1
        fitting = [shift for shift in range(12) if self.top < smallest << shift <= LARGEST]
        if self.bias is None:
            object.__setattr__(self, "bias", fitting[0])
        elif self.bias not in fitting:
            raise InputError(
                f"A bias of {self.bias} puts the smallest outlier, {smallest} << bias, among the normal values (up to "
                f"{self.top}) or beyond {LARGEST}; take {fitting[0]} to {fitting[-1]}."
            )

    @property
    def name(self) -> str:
        """For example "ovp4/row", "ovp4_flint/tensor", "ovp8_e4m3/row"."""
        own = replace(self, bias=None)
        parts = [f"ovp{self.bits}", *(["unsigned"] * (not self.signed))]
        parts += ["flint"] * (self.normal == "flint") + ["left"] * (self.keep == "left")
        parts += [f"e{self.exponent_bits}m{self.mantissa_bits}"] * (self.exponent_bits != 2)
        parts += [f"bias{self.bias}"] * (self.bias != own.bias)
        return "_".join(parts) + f"/{self.granularity}"

    @property
    def code_bits(self) -> int:
        """Bits of a slot."""
        return self.bits

    @property
    def operand(self) -> str | None:
        """Decoded pairs of 4 bits as exponent and signed integer; pairs of 8 bits take four such products, unsigned
        ones a multiplier that engines do not have."""
        highest = (1 << self.exponent_bits) - 1 + self.shift
        return "ovp4" if self.bits == 4 and self.signed and highest < 8 else None

    @property
    def identifier(self) -> int:
        """The code of a victim."""
        return 1 << (self.bits - 1) if self.signed else (1 << self.bits) - 1

    @property
    def _magnitude(self) -> int:
        """Mask of the bits that hold a magnitude."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def mantissa_bits(self) -> int:
        """Of an outlier."""
        return self.bits - self.signed - self.exponent_bits

    @property
    def shift(self) -> int:
        """The bias, whether given or found."""
        return int(self.bias or 0)

    @property
    def top(self) -> int:
        """The largest normal value."""
        return 16 if self.normal == "flint" else self.identifier - 1

    @cached_property
    def normals(self) -> NDArray[np.int64]:
        """What the code of a normal value means, (2^bits,); 0 for the identifier."""
        codes = np.arange(1 << self.bits)
        if self.normal == "flint":
            magnitude = np.array(_FLINT)[codes & 7]
            return np.asarray(np.where(codes > 8, -magnitude, magnitude * (codes < 8)), np.int64)
        values = (codes ^ self.identifier) - self.identifier if self.signed else codes
        return np.asarray(np.where(codes == self.identifier, 0, values), np.int64)

    @cached_property
    def outliers(self) -> NDArray[np.int64]:
        """What the code of an outlier means, (2^bits,); 0 for the lowest, which is not used, and the identifier."""
        exponent, integer = self._outlier_parts(np.arange(1 << self.bits))
        return np.asarray(integer << exponent, np.int64)

    @property
    def largest(self) -> int:
        """The largest outlier that is encoded."""
        return int(self.outliers[self.outliers <= LARGEST].max())

    def _outlier_parts(self, codes: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Exponent and signed integer of the codes of outliers; of the unused code and the identifier 0 and 0."""
        magnitude = codes.astype(np.int64) & self._magnitude
        used = (magnitude > 0) & (codes != self.identifier)
        integer = (1 << self.mantissa_bits) + (magnitude & ((1 << self.mantissa_bits) - 1))
        exponent = np.where(used, (magnitude >> self.mantissa_bits) + self.shift, 0)
        return exponent, np.where(used, np.where(codes > self._magnitude, -integer, integer), 0)

    def _normal_parts(self, codes: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Exponent and signed integer of the codes of normal values."""
        value = self.normals[codes]
        if self.normal == "int":
            return np.zeros_like(value), value
        exponent = np.array([0, 0, 0, 0, 4, 3, 1, 1])[codes.astype(np.int64) & 7]
        return exponent, np.sign(value) * (np.abs(value) >> exponent)

    @property
    def _settings(self) -> tuple[int, int, int, float, float, bool, bool]:
        return (self.bits, self.mantissa_bits, self.shift, float(self.top), float(self.largest),
                self.normal == "flint", self.keep == "left")  # fmt: skip

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

        Raises InputError for NaN, infinities, scales that are not positive, and an odd last axis where `pad` is false.
        """
        real = base.finite(x, self.name)
        real = real if self.signed else np.maximum(real, np.float32(0))
        missing = self._padded(real.shape[-1]) - real.shape[-1]
        if real.shape[-1] % 2 and not self.pad:
            raise InputError(f"{self.name}: pairs of a last axis of {real.shape[-1]}; make it even or allow padding.")
        filled = np.pad(real, [(0, 0)] * (real.ndim - 1) + [(0, missing)]) if missing else real
        grouped = base.groups_of(filled, self.granularity, self.name)
        rows = grouped.reshape(-1, grouped.shape[-1])
        if scale is None:
            flat = self.search(rows, errors=False)[0]
        else:
            flat = np.ascontiguousarray(scale, np.float32).reshape(-1)
            if flat.size != len(rows) or not (flat > 0).all() or not np.isfinite(flat).all():
                raise InputError(f"{self.name}: expected {len(rows)} positive scales, got {flat.size}.")
        codes = np.empty(filled.size, np.uint8)
        values = np.ascontiguousarray(rows).reshape(-1)
        _native.outlier_victim_encode(values, flat, *self._settings, self.identifier, codes)
        single = self.granularity == "tensor"
        return Encoded(codes.reshape(filled.shape), flat.reshape(()) if single else flat.reshape(grouped.shape[:-1]),
                       None, real.shape)  # fmt: skip

    def search(
        self, rows: NDArray[np.float32], errors: bool = True, exhaustive: bool = False
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The scale of least squared error for every row (rows, even size), of the candidates, and that error.

        The same scale whether bounds leave out candidates or, `exhaustive`, every one is tried on every value. Without
        `errors`, which take another rounding, none are returned: (0,). Rows of zeros get a scale as if their largest
        value were 1.
        """
        flat = np.ascontiguousarray(rows, np.float32).reshape(-1)
        reach, found = np.empty(len(rows), np.float64), np.empty(len(rows), np.float32)
        error = np.empty(len(rows) if errors else 0, np.float64)
        _native.outlier_victim_reach(flat, 3.0, reach)
        _native.outlier_victim_search(
            flat, np.where(reach > 0, reach, 1.0) / self.top, np.arange(*self.search_percent, dtype=np.float64),
            *self._settings, exhaustive, found, error,
        )  # fmt: skip
        return found, error

    def integers(self, codes: NDArray[Any]) -> NDArray[np.int64]:
        """Values of codes (..., even k) in units of the normal values; 0 for victims. Raises InputError for two
        victims."""
        victim, partner = self._victims(codes)
        return np.where(victim, 0, np.where(partner, self.outliers[codes], self.normals[codes]))

    def _victims(self, codes: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which codes are victims, and which are outliers beside one."""
        victim = codes == self.identifier
        partner = victim.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
        if (victim & partner).any():
            raise InputError(f"{self.name}: a pair holds two victims, which no encoder makes.")
        return victim, partner

    def exponent_integers(self, codes: NDArray[Any]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """What the decoder emits for codes (..., even k): exponents and integers, one pair of arrays for 4 bits, two
        for 8, most significant first; their sum of integer << exponent is the value. Raises as `integers`."""
        victim, partner = self._victims(codes)
        (outlier_exponent, outlier), (normal_exponent, normal) = self._outlier_parts(codes), self._normal_parts(codes)
        exponent = np.where(victim, 0, np.where(partner, outlier_exponent, normal_exponent))
        integer = np.where(victim, 0, np.where(partner, outlier, normal))
        if self.bits == 4:
            return [(exponent, integer)]
        return [(exponent + 4, integer >> 4), (exponent, integer & 15)]

    def operand_words(self, encoded: Encoded) -> NDArray[np.int64]:
        """Exponents (3 bits) and signed integers (4 bits) of 4-bit codes as the words that engines take."""
        if self.operand is None:
            raise InputError(
                f"{self.name} has no words of 3-bit exponents and 4-bit integers; 8 bits take four products."
            )
        exponent, integer = self.exponent_integers(encoded.codes)[0]
        word = (exponent << 4) | (integer & 15)
        return np.asarray((word ^ 64) - 64)

    def decode(self, encoded: Encoded) -> NDArray[np.float32]:
        """Values times their scales. Raises InputError for two victims in a pair."""
        real = np.empty(encoded.codes.size, np.float32)
        normal, outlier = (np.zeros(256, np.float32) for _ in range(2))
        normal[: 1 << self.bits], outlier[: 1 << self.bits] = self.normals, self.outliers
        scale = np.ascontiguousarray(encoded.scale, np.float32).reshape(-1)
        codes = np.ascontiguousarray(encoded.codes, np.uint8).reshape(-1)
        if _native.outlier_victim_decode(codes, scale, normal, outlier, self.identifier, real):
            raise InputError(f"{self.name}: a pair holds two victims, which no encoder makes.")
        whole: NDArray[np.float32] = real.reshape(encoded.codes.shape)
        return whole if whole.shape == encoded.shape else np.ascontiguousarray(whole[..., : encoded.shape[-1]])

    def pack(self, encoded: Encoded) -> NDArray[np.uint8]:
        """Codes, two of 4 bits in a byte, then scales."""
        return np.concatenate(
            [base.pack_codes(encoded.codes, self.bits), encoded.scale.astype(np.float32).reshape(-1).view(np.uint8)]
        )

    def unpack(self, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> Encoded:
        """The inverse of `pack`. Raises InputError for another number of bytes and pairs of two victims."""
        base.check_packed(packed, shape, self.name)
        rows, size = int(np.prod(shape[:-1], dtype=np.int64)), self._padded(shape[-1])
        scales = base.scale_count((*shape[:-1], size), self.granularity)
        code_bytes = rows * size * self.bits // 8
        if packed.size != code_bytes + 4 * scales:
            raise InputError(f"{self.name} {shape} is {code_bytes + 4 * scales} bytes, not {packed.size}.")
        codes = base.unpack_codes(packed[:code_bytes], self.bits, rows * size).astype(np.uint8)
        codes = codes.reshape(*shape[:-1], size)
        self._victims(codes)
        scale = np.frombuffer(packed[code_bytes:].tobytes(), np.float32)
        base.check_scales(scale, self.name)
        single = self.granularity == "tensor"
        return Encoded(codes, scale.reshape(()) if single else scale.reshape(*shape[:-1], scales // max(1, rows)), None,
                       shape)  # fmt: skip


def named_pairs(bits: int, options: str, granularity: Granularity) -> OutlierVictimPairs:
    """From the parts of a name: "_flint", "_left", "_e4m3" and "_bias3", in any order. Raises InputError for others."""
    chosen: dict[str, Any] = {}
    for option in options.split("_")[1:]:
        exponent, bias = re.fullmatch(r"e(\d)m(\d)", option), re.fullmatch(r"bias(\d+)", option)
        if option == "flint":
            chosen["normal"] = "flint"
        elif option == "unsigned":
            chosen["signed"] = False
        elif option == "left":
            chosen["keep"] = "left"
        elif bias:
            chosen["bias"] = int(bias[1])
        elif exponent and int(exponent[1]) + int(exponent[2]) == bits - ("_unsigned" not in options):
            chosen["exponent_bits"] = int(exponent[1])
        else:
            raise InputError(f"Outlier-victim pairs of {bits} bits have options flint, unsigned, left, e2m{bits - 3} "
                             f"and bias2, not {option!r}.")  # fmt: skip
    return OutlierVictimPairs(bits, granularity, **chosen)


def adaptive_pairs(
    x: Array,
    granularity: Granularity = "row",
    keep: Keep = "larger",
    search_percent: tuple[int, int, int] = SEARCH,
) -> OutlierVictimPairs:
    """4-bit pairs with whichever normal values, integers or flint, round x with the smaller squared error after both
    searched their scales (one type for the whole tensor)."""
    made = OutlierVictimPairs(4, granularity, keep, "int", search_percent=search_percent)
    return best_pairs([made, replace(made, normal="flint", bias=None)], x)[0]


def best_pairs(choices: Sequence[OutlierVictimPairs], x: Array) -> tuple[OutlierVictimPairs, Encoded]:
    """The first format of least squared error over all of x, each with its own best scales, and x in it."""
    real, _ = base.as_numpy(x)
    least, best = np.inf, None
    for form in choices:
        encoded = form.encode(x)
        if len(choices) == 1:
            return form, encoded
        error = float(np.square(form.decode(encoded) - real, dtype=np.float64).sum())
        if error < least:
            least, best = error, (form, encoded)
    if best is None:
        raise InputError("No format to choose from, or errors that are not finite.")
    return best


def clipping_search(rows: NDArray[np.float32], bits: int, exhaustive: bool = False) -> NDArray[np.float32]:
    """The scale (rows,) of least squared error for plain integers of `bits` bits: 2 to 100 percent of the one that maps
    a row's largest magnitude to the top of the range; `exhaustive` as in `OutlierVictimPairs.search`."""
    top = float((1 << (bits - 1)) - 1)
    largest = np.abs(rows).max(axis=1).astype(np.float64)
    found = np.empty(len(rows), np.float32)
    even = np.pad(rows, [(0, 0), (0, rows.shape[1] % 2)])
    _native.outlier_victim_search(
        np.ascontiguousarray(even, np.float32).reshape(-1), np.where(largest > 0, largest, 1.0) / top,
        np.arange(100, 0, -2, dtype=np.float64), bits, 1, _UNREACHED, top, 2.0 ** (_UNREACHED + 3),
        False, False, exhaustive, found, np.empty(0),
    )  # fmt: skip
    return found


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
