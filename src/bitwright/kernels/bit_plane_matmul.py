"""Exact integer products from one-bit planes (bipolar-INT): round, pack, multiply, and the description of that work.

A bipolar code of p bits is p planes of +-1 values; a product of two operands is a sum over pairs of planes i, j of
2^(i+j) * (K - 2 popcount(w_i xor a_j)), accumulated in registers of a 4 x 4 tile of results: no plane of results is
ever stored. `tiling` describes that work; `matmul` and `linear` execute it in native code (AVX-512 VPOPCNTDQ, AVX2,
POPCNT or portable, chosen at run time), `bit_plane_cost` predicts its time from the same description.

Source: arXiv 2409.17870 (ASP-DAC 2025) and arXiv 2508.19087, bipolar-INT and recovery-oriented memory use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.arithmetic.formats.bipolar import BipolarOperand, check_bits
from bitwright.core.errors import InputError
from bitwright.kernels import threads as native_threads
from bitwright.kernels.threads import thread_count

Layout = Literal["plane", "blocked"]
Form = Literal["xor", "and"]
Floats = NDArray[np.float32]
T = TypeVar("T", np.int32, np.float32)
STEP = 512  # positions of one XOR, one population count and one addition; rows of planes are padded to them
TILE = 4  # rows and columns of results in registers
PATHS = ("avx512", "avx2", "popcnt", "portable")
_NEAR_BYTES = 32 << 10  # as in native/bit_plane_matmul.cpp: planes of a tile in the first-level cache,
_COLUMN_BYTES = 256 << 10  # planes of a block of columns in the second-level cache


@dataclass(frozen=True)
class PackedPlanes:
    """Planes of codes (rows, k), k padded with zero bits to a multiple of 512, as 64-bit words.

    Layout "plane": (bits, rows, steps, 8) words; "blocked": (blocks of 4 rows, steps, bits, 4, 8), so that everything a
    tile of results needs of a step lies together; its last block is filled up with zero rows.
    """

    words: NDArray[np.uint64]
    rows: int
    k: int
    bits: int
    layout: Layout

    @property
    def bytes(self) -> int:
        """Stored bytes: bits * rows (blocked: a multiple of 4) * padded k / 8."""
        return int(self.words.nbytes)


@dataclass(frozen=True)
class QuantisedPlanes:
    """Rows of real numbers as planes: value ~ scale * bipolar integer; `scale` float32 and `sums` int64, (rows,)."""

    planes: PackedPlanes
    scale: Floats
    sums: NDArray[np.int64]


def usable_path(path: str | None = None) -> str:
    """The instruction set of `PATHS` asked for, or the fastest of this CPU; see `threads.usable_path`."""
    return native_threads.usable_path(path, PATHS, _native.bit_plane_path(), "bit-plane products")


def _empty(rows: int, k: int, bits: int, layout: Layout) -> PackedPlanes:
    if layout not in ("plane", "blocked"):
        raise InputError(f"Layouts are plane and blocked, not {layout!r}.")
    padded = rows if layout == "plane" else -(-rows // TILE) * TILE
    return PackedPlanes(np.zeros(padded * bits * -(-k // STEP) * (STEP // 64), np.uint64), rows, k, bits, layout)


def pack(codes: ArrayLike, bits: int, layout: Layout = "blocked", threads: int | None = None) -> PackedPlanes:
    """Planes of codes 0 .. 2^bits - 1, uint8 (rows, k). Raises InputError for other types, shapes, codes or bits, and
    for arrays that are not contiguous."""
    array = np.asarray(codes)
    check_bits(bits)
    if array.dtype != np.uint8 or array.ndim != 2 or not array.size:
        raise InputError(f"Codes are uint8 (rows, k) with at least one value, not {array.dtype} {array.shape}.")
    if not array.flags.c_contiguous:
        raise InputError("Codes (rows, k) are not contiguous along k; pass numpy.ascontiguousarray of them.")
    if bits < 8 and int(array.max()) >> bits:
        raise InputError(f"Codes up to {int(array.max())} do not fit {bits} bits.")
    planes = _empty(array.shape[0], array.shape[1], bits, layout)
    _native.pack_planes(array, bits, layout == "blocked", thread_count(threads), planes.words)
    return planes


def unpack(planes: PackedPlanes) -> NDArray[np.uint8]:
    """The codes (rows, k) again."""
    steps = -(-planes.k // STEP)
    if planes.layout == "plane":
        words = planes.words.reshape(planes.bits, planes.rows, steps * 8)
    else:
        blocks = planes.words.reshape(-1, steps, planes.bits, TILE, 8).transpose(2, 0, 3, 1, 4)
        words = blocks.reshape(planes.bits, -1, steps * 8)[:, : planes.rows]
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")[..., : planes.k]
    return np.asarray((bits << np.arange(planes.bits, dtype=np.uint8)[:, None, None]).sum(axis=0, dtype=np.uint8))


def quantise(
    x: Floats,
    bits: int,
    scale: Floats | None = None,
    share: float = 1.0,
    layout: Layout = "blocked",
    threads: int | None = None,
    vectors: bool = True,
) -> QuantisedPlanes:
    """Round rows (rows, k), split into planes and pack, in one pass over rows that stay in the cache.

    code = clip(round((x / scale + 2^bits - 1) / 2), 0, 2^bits - 1), ties to even; `scale` (rows,) is given or
    `share` (0 to 1) of the largest magnitude over 2^bits - 1; 0 for rows of zeros. Raises InputError for other types,
    shapes, NaN, infinities, and scales that are not positive.
    """
    check_bits(bits)
    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim != 2 or not x.size:
        raise InputError("Rows to round are float32 (rows, k) with at least one value.")
    if not x.flags.c_contiguous:
        raise InputError("Rows (rows, k) are not contiguous along k; pass numpy.ascontiguousarray of them.")
    if not 0 < share <= 1:
        raise InputError(f"The largest magnitude times {share} asked for as a range; expected more than 0, at most 1.")
    planes = _empty(x.shape[0], x.shape[1], bits, layout)
    given = scale is not None
    scales = np.empty(len(x), np.float32) if scale is None else np.array(scale, np.float32)
    if scales.shape != (len(x),) or (given and not (np.isfinite(scales) & (scales > 0)).all()):
        raise InputError(f"Scales are {len(x)} positive numbers, one per row.")
    sums = np.empty(len(x), np.int64)
    used = thread_count(threads)
    _native.quantise_planes(x, bits, share, given, layout == "blocked", vectors, used, scales, sums, planes.words)
    if not _native.all_finite(x.reshape(-1)):
        raise InputError(f"bipolar{bits} has no code for NaN or infinity, which the rows {x.shape} hold.")
    return QuantisedPlanes(planes, scales, sums)


def _check(w: PackedPlanes, a: PackedPlanes) -> None:
    if w.k != a.k:
        raise InputError(f"Operands of k = {w.k} and {a.k} do not multiply.")
    if w.k * ((1 << w.bits) - 1) * ((1 << a.bits) - 1) >= 1 << 31:
        raise InputError(f"Sums of {w.bits} x {a.bits} bit products over k = {w.k} could leave int32; split k.")


def _result(out: NDArray[T] | None, shape: tuple[int, int], kind: type[T]) -> NDArray[T]:
    if out is None:
        return np.empty(shape, kind)
    if out.shape != shape or out.dtype != kind or not out.flags.c_contiguous:
        raise InputError(f"A contiguous {kind.__name__} {shape} takes the result, not {out.dtype} {out.shape}.")
    return out


def matmul(
    w: PackedPlanes,
    a: PackedPlanes,
    threads: int | None = None,
    form: Form = "xor",
    path: str | None = None,
    out: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """Exact product of the bipolar integers of w (m, k) and a (n, k): int32 (m, n).

    `form` "and" gives the same from ANDs and row sums, for machines without one-bit XOR products. `path`: one of
    `PATHS`, by default the fastest of this CPU; `threads`: as many as torch uses; `out` takes the result. Raises
    InputError for operands of another k, sums that could leave int32, unknown forms and paths.
    """
    _check(w, a)
    if form not in ("xor", "and"):
        raise InputError(f"Forms are xor and and, not {form!r}.")
    out = _result(out, (w.rows, a.rows), np.int32)
    _native.bit_plane_matmul(
        w.words, w.bits, w.layout == "blocked", a.words, a.bits, a.layout == "blocked", w.k, form == "xor",
        usable_path(path), thread_count(threads), out,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class LinearWeights:
    """Weights (outputs, k) for `linear`: planes, and float32 (outputs,) scales, offsets, sums of integers, bias."""

    planes: PackedPlanes
    scale: Floats
    offset: Floats
    sums: Floats
    bias: Floats

    @staticmethod
    def of(operand: BipolarOperand, bias: Floats | None = None, layout: Layout = "blocked") -> LinearWeights:
        """Packed once from codes; a scale or offset of the tensor is repeated for its rows."""
        rows, k = operand.codes.shape
        sums = 2 * operand.codes.astype(np.int64).sum(axis=1) - k * ((1 << operand.bits) - 1)
        scale, offset = (
            np.ascontiguousarray(np.broadcast_to(each.reshape(-1), rows), np.float32)
            for each in (operand.scale, operand.offset)
        )
        plus = np.zeros(rows, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32)
        if plus.shape != (rows,):
            raise InputError(f"Bias of shape {plus.shape} for {rows} outputs given.")
        return LinearWeights(pack(operand.codes, operand.bits, layout), scale, offset, sums.astype(np.float32), plus)


def linear(
    weights: LinearWeights,
    x: QuantisedPlanes,
    offset: Floats | None = None,
    threads: int | None = None,
    path: str | None = None,
    out: Floats | None = None,
) -> Floats:
    """x @ weights^T + bias from planes: float32 (rows of x, outputs), scales, offsets and bias applied in the tile.

    `offset` (rows,) float32 belongs to x: value = scale * integer + offset. Raises InputError as `matmul`.
    """
    w, a = weights.planes, x.planes
    _check(w, a)
    of_a = np.zeros(a.rows, np.float32) if offset is None else np.ascontiguousarray(offset, np.float32)
    if of_a.shape != (a.rows,):
        raise InputError(f"Offsets of shape {of_a.shape} for {a.rows} rows given.")
    out = _result(out, (a.rows, w.rows), np.float32)
    _native.bit_plane_linear(
        w.words, w.bits, w.layout == "blocked", a.words, a.bits, a.layout == "blocked", w.k, usable_path(path),
        thread_count(threads), weights.scale, weights.offset, weights.sums, weights.bias, x.scale, of_a,
        x.sums.astype(np.float32), out,
    )  # fmt: skip
    return out


def affine_matmul(w: BipolarOperand, a: BipolarOperand, threads: int | None = None) -> NDArray[np.float64]:
    """The product of converted tensors (m, k) and (n, k) in float64, offsets included: row sums of integers."""
    k = w.codes.shape[1]
    product = matmul(pack(w.codes, w.bits), pack(a.codes, a.bits), threads).astype(np.float64)
    w_sums, a_sums = (
        2 * side.codes.astype(np.int64).sum(axis=1)[:, None] - k * ((1 << side.bits) - 1) for side in (w, a)
    )
    scale, offset = a.scale.T, a.offset.T
    return np.asarray(
        product * (w.scale * scale) + w.offset * (scale * a_sums.T) + offset * (w.scale * w_sums)
        + k * w.offset * offset
    )  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """What a product does: tiles of results, for every pair of planes, over ranges of steps of 512 positions.

    A single column of several planes runs as so many columns of one plane, whose counts are added with their weights.
    """

    m: int
    n: int
    k: int
    w_bits: int
    a_bits: int

    @property
    def columns(self) -> int:
        """Columns of the tiles."""
        return self.a_bits if self.n == 1 else self.n

    @property
    def column_planes(self) -> int:
        """Planes of one of these columns."""
        return 1 if self.n == 1 else self.a_bits

    @property
    def chunks(self) -> int:
        """Steps of 512 positions along k, the padding included."""
        return -(-self.k // STEP)

    @property
    def pairs(self) -> int:
        """Pairs of planes."""
        return self.w_bits * self.a_bits

    @property
    def tiles(self) -> int:
        """Tiles of results."""
        return -(-self.m // TILE) * -(-self.columns // TILE)

    @property
    def steps(self) -> int:
        """XOR, population count and addition triples of 512 positions; rows are filled up to tiles, columns not."""
        return -(-self.m // TILE) * TILE * self.n * self.chunks * self.pairs

    @property
    def chunks_at_once(self) -> int:
        """Steps along k whose planes stay in the first-level cache while all their pairs are multiplied."""
        return max(1, _NEAR_BYTES // (TILE * STEP // 8 * (self.w_bits + self.column_planes)))

    @property
    def doublings(self) -> int:
        """Doublings of counts between pairs of another weight (Horner)."""
        ranges = -(-self.chunks // self.chunks_at_once)
        return -(-self.m // TILE) * TILE * self.columns * ranges * (self.w_bits + self.column_planes - 1)

    @property
    def passes(self) -> int:
        """How often the weights are read: once per block of columns that stays in the second-level cache."""
        columns = max(1, _COLUMN_BYTES // (TILE * self.column_planes * self.chunks * STEP // 8)) * TILE
        return -(-self.columns // columns)

    @property
    def weight_bytes(self) -> int:
        """Packed weights."""
        return -(-self.m // TILE) * TILE * self.w_bits * self.chunks * STEP // 8

    @property
    def activation_bytes(self) -> int:
        """Packed activations."""
        return -(-self.n // TILE) * TILE * self.a_bits * self.chunks * STEP // 8

    @property
    def bytes_written(self) -> int:
        """The int32 or float32 result; no intermediate planes."""
        return 4 * self.m * self.n

    @property
    def bytes_moved(self) -> int:
        """All bytes read and written."""
        return self.weight_bytes * self.passes + self.activation_bytes + self.bytes_written


def tiling(m: int, n: int, k: int, w_bits: int, a_bits: int) -> Tiling:
    """The tiling of blocked planes. Raises InputError for sizes below 1 and widths outside 1..8."""
    if min(m, n, k) < 1:
        raise InputError(f"A product of ({m}, {k}) and ({n}, {k}) is not defined; sizes start at 1.")
    return Tiling(m, n, k, check_bits(w_bits), check_bits(a_bits))
