"""MatShift and MatAdd in native code: products by arithmetic shifts, and sums of the rows a binary mask selects.

`matshift`: y[m, n] = sum over k of s[n, k] * (x[m, k] >> -p[n, k]) on int32 x, exact in int64. Every shift of a value,
with either sign, is made once and kept; a term is then one addition from a table (AVX-512, AVX2 or portable vectors).
`matadd`: y[m, n] = sum of v[k, n] over the bits set in row m; the sums of every subset of four rows are made once.
Masks take one bit per element. `matshift_loop` and `matadd_loop` are the straight loops both are measured against.

Source: arXiv 2306.06446 (NeurIPS 2023), MatShift and MatAdd; the subset sums are those of Arlazarov et al., 1970.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.arithmetic.shift_and_add import LOWEST_EXPONENT
from bitwright.core.errors import InputError
from bitwright.kernels import threads as native_threads
from bitwright.kernels.threads import thread_count

PATHS = ("avx512", "avx2", "portable")
_TILE = 16  # columns, as in native/shift_and_add.cpp
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ShiftWeights:
    """Signed powers of two (outputs, inputs) as places in tables of shifts: `places` uint16 (inputs, padded outputs).

    `first` is the smallest shift that occurs and `count` how many there are from it; `gain` bounds the sum of the
    magnitudes 2^p of an output, so that sums of x stay below gain * max |x| + inputs.
    """

    places: NDArray[np.uint16]
    outputs: int
    first: int
    count: int
    gain: float

    @property
    def inputs(self) -> int:
        """Terms of a sum."""
        return int(self.places.shape[0])


@dataclass(frozen=True)
class PackedMask:
    """Binary rows (..., m, k), 64 positions per word: `words` uint64 (..., m, words), the first position lowest."""

    words: NDArray[np.uint64]
    k: int

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return int(self.words.nbytes)


def usable_path(path: str | None = None) -> str:
    """The instruction set of `PATHS` asked for, or the fastest of this CPU; see `threads.usable_path`."""
    return native_threads.usable_path(path, PATHS, _native.shift_and_add_path(), "shifts and additions")


def pack_shifts(exponent: ArrayLike, sign: ArrayLike) -> ShiftWeights:
    """Exponents -14 .. 0 and signs -1, 0, 1, integers (outputs, inputs), for `matshift`.

    Raises InputError for other shapes, types and values.
    """
    powers, signs = np.asarray(exponent), np.asarray(sign)
    if powers.ndim != 2 or powers.shape != signs.shape or not powers.size:
        raise InputError(
            f"Exponents {powers.shape} and signs {signs.shape}: expected the same (outputs, inputs), at least one."
        )
    if not all(np.issubdtype(each.dtype, np.integer) for each in (powers, signs)):
        raise InputError(f"Exponents and signs are integers, not {powers.dtype} and {signs.dtype}.")
    if powers.min() < LOWEST_EXPONENT or powers.max() > 0 or signs.min() < -1 or signs.max() > 1:
        raise InputError(
            f"Exponents from {powers.min()} to {powers.max()}, signs from {signs.min()} to {signs.max()}: expected "
            f"{LOWEST_EXPONENT} to 0 and -1 to 1."
        )
    used = -powers[signs != 0]
    first, last = (int(used.min()), int(used.max())) if used.size else (0, 0)
    outputs, inputs = powers.shape
    places = np.empty((inputs, -(-outputs // _TILE) * _TILE), np.uint16)
    _native.shift_places(
        np.ascontiguousarray(powers, np.int8), np.ascontiguousarray(signs, np.int8), first, last - first + 1, places
    )
    gain = float((np.abs(signs) * np.exp2(powers.astype(np.float64))).sum(1).max())
    return ShiftWeights(places, outputs, first, last - first + 1, gain)


def _fits_int32(x: NDArray[np.int32], weights: ShiftWeights) -> bool:
    return weights.gain * _native.largest_magnitude(x.reshape(-1)) + weights.inputs < 2**31


def _rows(x: ArrayLike, inputs: int) -> NDArray[np.int32]:
    values = np.asarray(x)
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"Shifts are of integers, not of {values.dtype}; to_fixed_point makes them of real numbers.")
    if values.ndim != 2 or values.shape[1] != inputs or not values.size:
        raise InputError(f"Rows {values.shape} do not fit weights of {inputs} inputs: expected (m, {inputs}), m >= 1.")
    if values.dtype != np.int32 and (values.min() < -(1 << 31) or values.max() >= 1 << 31):
        raise InputError(f"Values from {values.min()} to {values.max()} do not fit int32.")
    return np.ascontiguousarray(values, np.int32)


def matshift(
    x: ArrayLike, weights: ShiftWeights, threads: int | None = None, path: str | None = None, wide: bool | None = None
) -> Integers:
    """Integers x (m, inputs) times signed powers of two by arithmetic shifts: int64 (m, outputs), exact.

    Sums run in int32 where none can leave it and in int64 otherwise; `wide=True` asks for int64. `threads`: as many as
    torch uses by default; `path`: one of `PATHS`. Raises InputError for other shapes, real numbers, values beyond
    int32, and `wide=False` where sums could leave int32.
    """
    rows = _rows(x, weights.inputs)
    fits = _fits_int32(rows, weights)
    if wide is False and not fits:
        raise InputError(f"Sums over {weights.inputs} inputs of these values could leave int32; leave wide unset.")
    out = np.empty((len(rows), weights.outputs), np.int64)
    _native.shift_matmul64(
        rows, weights.places, weights.first, weights.count, bool(wide) or not fits, usable_path(path),
        thread_count(threads), out,
    )  # fmt: skip
    return out


def matshift32(
    x: NDArray[np.int32], weights: ShiftWeights, threads: int | None = None, path: str | None = None
) -> NDArray[np.int32]:
    """As `matshift`, into int32. Raises InputError also where a sum could leave int32."""
    rows = _rows(x, weights.inputs)
    if not _fits_int32(rows, weights):
        raise InputError(f"Sums over {weights.inputs} inputs of these values could leave int32; use matshift.")
    out = np.empty((len(rows), weights.outputs), np.int32)
    _native.shift_matmul32(
        rows, weights.places, weights.first, weights.count, False, usable_path(path), thread_count(threads), out
    )
    return out


def fixed_point(x: NDArray[np.float32], fraction_bits: int = 16) -> NDArray[np.int32]:
    """float32 x as int32 in units of 2^-fraction_bits (0 .. 31), rounded down and clipped.

    Raises InputError for NaN and other types."""
    if x.dtype != np.float32 or not 0 <= fraction_bits <= 31:
        raise InputError(f"Fixed point of {x.dtype} with {fraction_bits} fraction bits: expected float32 and 0 to 31.")
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty(flat.shape, np.int32)
    if _native.fixed_point(flat, fraction_bits, out):
        raise InputError("Fixed-point numbers of NaN were asked for.")
    return out.reshape(x.shape)


def shift_linear(
    x: NDArray[np.float32], weights: ShiftWeights, bias: NDArray[np.float32] | None = None, threads: int | None = None,
    path: str | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """A shift layer on 16.16 fixed-point activations: x (m, inputs) -> (m, outputs), both float32; `bias` (outputs,).

    Raises InputError as `fixed_point` and `matshift` do.
    """
    rows = _rows(fixed_point(x), weights.inputs)
    added = np.zeros(weights.outputs, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32)
    if added.shape != (weights.outputs,):
        raise InputError(f"A bias {added.shape} does not fit {weights.outputs} outputs.")
    out = np.empty((len(rows), weights.outputs), np.float32)
    _native.shift_linear(
        rows, weights.places, weights.first, weights.count, not _fits_int32(rows, weights), added, 2.0**-16,
        usable_path(path), thread_count(threads), out,
    )  # fmt: skip
    return out


def pack_mask(mask: ArrayLike) -> PackedMask:
    """Masks of 0 and 1 (or bool), (..., m, k), one bit each. Raises InputError for other values and fewer axes."""
    rows = np.asarray(mask)
    if rows.ndim < 2 or not rows.size:
        raise InputError(f"Masks are (..., m, k) with at least one value, not {rows.shape}.")
    if rows.dtype != np.bool_ and not ((rows == 0) | (rows == 1)).all():
        raise InputError("Masks hold 0 and 1 only.")
    k = rows.shape[-1]
    packed = np.zeros((*rows.shape[:-1], -(-k // 64) * 8), np.uint8)
    packed[..., : -(-k // 8)] = np.packbits(rows.astype(np.bool_, copy=False), axis=-1, bitorder="little")
    return PackedMask(packed.view(np.uint64), k)


def unpack_mask(mask: PackedMask) -> NDArray[np.uint8]:
    """The rows (..., m, k) again."""
    return np.unpackbits(mask.words.view(np.uint8), axis=-1, bitorder="little")[..., : mask.k]


def matadd(
    mask: PackedMask, v: ArrayLike, threads: int | None = None, path: str | None = None
) -> Integers | NDArray[np.float32]:
    """Sums of the rows of v (..., k, n) that each mask row (..., m, k) selects: (..., m, n).

    Integers give exact int64 (modulo 2^64). float32 gives float32 whose error is at most 1e-6 of the sum of the
    selected magnitudes: runs of 64 rows are summed in float32, in chains of at most 8, their sums in float64. NaN and
    infinities go into the sums of the rows that select them and into no others. Raises InputError for other types and
    shapes.
    """
    values = np.asarray(v)
    leading = mask.words.shape[:-2]
    if values.ndim != mask.words.ndim or values.shape[:-2] != leading or values.shape[-2] != mask.k or not values.size:
        raise InputError(
            f"Masks {(*mask.words.shape[:-1], mask.k)} do not select rows of {values.shape}: expected (..., m, k) and "
            "(..., k, n)."
        )
    rows, columns = mask.words.shape[-2], values.shape[-1]
    batch = mask.words.size // (rows * mask.words.shape[-1])
    words = np.ascontiguousarray(mask.words).reshape(batch, rows, -1)
    used, count = usable_path(path), thread_count(threads)
    if np.issubdtype(values.dtype, np.integer) and values.dtype != np.uint64:
        small = max(int(values.max()), -int(values.min())) < 1 << 24  # 64 of them stay below 2^30
        made = np.empty((batch, rows, columns), np.int64)
        if small:
            given32 = np.ascontiguousarray(values, np.int32).reshape(batch, mask.k, columns)
            _native.masked_sums_int32(words, given32, used, count, made)
        else:
            given64 = np.ascontiguousarray(values, np.int64).reshape(batch, mask.k, columns)
            _native.masked_sums_int64(words, given64, used, count, made)
        return made.reshape(*leading, rows, columns)
    if values.dtype != np.float32:
        raise InputError(f"Rows to add are integers or float32, not {values.dtype}.")
    given = np.ascontiguousarray(values).reshape(batch, mask.k, columns)
    sums = np.empty((batch, rows, columns), np.float32)
    _native.masked_sums_float32(words, given, used, count, sums)
    return sums.reshape(*leading, rows, columns)


def matshift_loop(
    x: NDArray[np.int32], exponent: NDArray[np.int8], sign: NDArray[np.int8], threads: int | None = None
) -> NDArray[np.int32]:
    """What `matshift` is measured against: one loop of variable shifts, signs and additions, vectorised by the compiler
    and threaded; int32 (m, n), modulo 2^32. Exponents -31 .. 0 and signs (n, k). Raises InputError for other shapes."""
    if x.ndim != 2 or exponent.shape != sign.shape or exponent.ndim != 2 or exponent.shape[1] != x.shape[1]:
        raise InputError(f"Shifts of {x.shape} by {exponent.shape} and {sign.shape}: expected (m, k), (n, k), (n, k).")
    out = np.empty((x.shape[0], exponent.shape[0]), np.int32)
    _native.shift_matmul_loop(x, exponent, sign, thread_count(threads), out)
    return out


def matadd_loop(mask: NDArray[np.uint8], v: NDArray[np.float32], threads: int | None = None) -> NDArray[np.float32]:
    """What `matadd` is measured against: the straight loop over bytes 0 and 1 (batch, m, k) and rows (batch, k, n),
    vectorised by the compiler and threaded. Raises InputError for other shapes."""
    if mask.ndim != 3 or v.ndim != 3 or mask.shape[0] != v.shape[0] or mask.shape[2] != v.shape[1] or not mask.size:
        raise InputError(f"Masks {mask.shape} and rows {v.shape}: expected (batch, m, k) and (batch, k, n).")
    out = np.empty((mask.shape[0], mask.shape[1], v.shape[2]), np.float32)
    _native.masked_sums_loop(mask, v, thread_count(threads), out)
    return out
