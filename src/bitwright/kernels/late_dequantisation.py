"""Products with packed 4-bit weights on a CPU, scales and zero points applied once per group (late dequantisation).

`pack` stores two codes per byte in the order that the kernel reads; `matmul` takes int8 activations with a scale per
token (exact integer sums per group, AVX-512 VNNI) or float ones (codes become floats by a look-up in a register), and
gives bit for bit what `bitwright.arithmetic.late_dequantisation.matmul` gives for int8 and float16. `matmul_early` is
the other order with the same weights: every weight is dequantised before it is multiplied.

Source: arXiv 2411.16158, dequantisation after the product of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.arithmetic.late_dequantisation import GroupedWeights, check_weights
from bitwright.core.errors import InputError
from bitwright.kernels import threads as native_threads
from bitwright.kernels.threads import thread_count
from bitwright.kernels.work import Work

PATHS = ("avx512", "portable")
_MOST_POSITIONS = 1 << 19  # of a group: sums of int8 x uint4 products and z R stay within int32


@dataclass(frozen=True)
class PackedWeights:
    """Codes of weights (k, n), two per byte: columns in blocks of 16 (the last one padded), groups padded to multiples
    of 8 positions. `scale` float32 and `zero` uint8, (groups, n)."""

    words: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8]
    k: int
    n: int
    group: int

    @property
    def bytes(self) -> int:
        """Bytes of the codes, padding included; scales and zero points apart."""
        return int(self.words.nbytes)


def pack(weights: GroupedWeights) -> PackedWeights:
    """Codes of at most 4 bits in the order of the kernel. Raises InputError for wider ones, codes, zero points and
    scales that do not fit, and groups of more than 2^19 rows."""
    check_weights(weights)
    if weights.bits > 4:
        raise InputError(f"The kernel holds two codes in a byte; {weights.bits}-bit codes do not fit.")
    k, n = weights.codes.shape
    group = min(weights.group, k)
    if group > _MOST_POSITIONS:
        raise InputError(f"Sums of {group} products may leave int32; groups have at most {_MOST_POSITIONS} rows.")
    words = np.empty(_native.packed_uint4_bytes(k, n, group), np.uint8)
    _native.pack_uint4(np.ascontiguousarray(weights.codes), group, words)
    scale = np.ascontiguousarray(weights.scale, np.float32)
    return PackedWeights(words, scale, np.ascontiguousarray(weights.zero, np.uint8), k, n, group)


def usable_path(path: str | None = None) -> str:
    """The instruction set of `PATHS` asked for, or the fastest of this CPU; see `threads.usable_path`."""
    return native_threads.usable_path(path, PATHS, _native.late_dequantisation_path(), "4-bit products")


def matmul(
    x: ArrayLike,
    weights: PackedWeights,
    token_scale: ArrayLike | None = None,
    threads: int | None = None,
    path: str | None = None,
) -> NDArray[np.float32]:
    """Y (m, n) float32 of int8 codes x (m, k) with scales `token_scale` (m,), or of float16 or float32 x.

    `threads` defaults to those of torch, or to the cores. float32 products are rounded (with AVX-512 once, together
    with the addition). Raises InputError for other types and shapes, NaN, infinity and unusable token scales.
    """
    codes = np.asarray(x)
    if codes.dtype == np.int8:
        _check_shape(codes, weights)
        scale = np.ascontiguousarray(token_scale, np.float32) if token_scale is not None else np.empty(0, np.float32)
        if scale.shape != (len(codes),) or not (np.isfinite(scale) & (scale > 0)).all():
            raise InputError(f"int8 activations need {len(codes)} positive token scales, not {token_scale!r:.80}.")
        out = np.empty((len(codes), weights.n), np.float32)
        _native.uint4_matmul_int8(
            weights.words, weights.k, weights.n, weights.group, np.ascontiguousarray(codes), scale, weights.scale,
            weights.zero, usable_path(path), thread_count(threads), out,
        )  # fmt: skip
        return out
    if token_scale is not None:
        raise InputError("Float activations have no token scale.")
    return _float_matmul(codes, weights, True, threads, path)


def matmul_early(
    x: ArrayLike, weights: PackedWeights, threads: int | None = None, path: str | None = None
) -> NDArray[np.float32]:
    """Y (m, n) of float x; every weight becomes scale * (code - zero) in the innermost loop. Raises as `matmul`."""
    return _float_matmul(np.asarray(x), weights, False, threads, path)


def _float_matmul(
    x: NDArray[Any], weights: PackedWeights, late: bool, threads: int | None, path: str | None
) -> NDArray[np.float32]:
    _check_shape(x, weights)
    if x.dtype not in (np.float16, np.float32):
        raise InputError(f"Activations are int8, float16 or float32, not {x.dtype}.")
    real = np.ascontiguousarray(x, np.float32)
    if not _native.all_finite(real.reshape(-1)):
        raise InputError("Activations hold NaN or infinity.")
    out = np.empty((len(real), weights.n), np.float32)
    _native.uint4_matmul_float(
        weights.words, weights.k, weights.n, weights.group, real, weights.scale, weights.zero, late, usable_path(path),
        thread_count(threads), out,
    )  # fmt: skip
    return out


def _check_shape(x: NDArray[Any], weights: PackedWeights) -> None:
    if x.ndim != 2 or not len(x) or x.shape[1] != weights.k:
        raise InputError(f"Activations {x.shape} do not meet weights {(weights.k, weights.n)}; expected (m, k), m > 0.")


def work(m: int, weights: PackedWeights) -> Work:
    """What `matmul` of int8 activations does with m rows: products of codes, one scaling and one subtraction per group
    and result, the packed weights and their tables read once (they stay in the cache between tiles of rows, or not).

    Raises InputError for fewer than one row."""
    if m < 1:
        raise InputError(f"{m} rows asked for; expected at least one.")
    tables, results = weights.scale.nbytes + weights.zero.nbytes, 4 * m * weights.n
    return Work(
        {"matrix int8": 2.0 * m * weights.n * weights.k, "fp32": 2.0 * m * weights.scale.size},
        {"memory": weights.bytes + tables + m * weights.k + results},
        pieces=-(-weights.n // 16),
    )
