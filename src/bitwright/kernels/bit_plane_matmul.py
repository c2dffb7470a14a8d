"""Exact integer products from one-bit planes (bipolar-INT): pack, multiply, predict.

A bipolar code of p bits is p planes of +-1 values; a product of two operands is a sum over pairs of planes i, j of
2^(i+j) * (K - 2 popcount(w_i xor a_j)), accumulated in registers of an output tile: no plane of results is ever stored.
`tiling` describes that work: `matmul` executes it in native code (AVX-512 VPOPCNTDQ, POPCNT or portable, chosen at run
time), `predict` counts its steps and bytes for this or another machine.

Source: arXiv 2409.17870 (ASP-DAC 2025) and arXiv 2508.19087, bipolar-INT and recovery-oriented memory use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.core.errors import InputError

Layout = Literal["plane", "blocked"]
Form = Literal["xor", "and"]
_WORD = 512  # positions that rows of planes are padded to
PATHS = ("avx512", "popcnt", "portable")


@dataclass(frozen=True)
class PackedPlanes:
    """Planes of codes (rows, k): uint64 words (bits, rows, words) in the layout "plane", (rows, bits, words) "blocked",
    where all planes of a row lie together; k fastest, padded with zero bits to a multiple of 512."""

    words: NDArray[np.uint64]
    rows: int
    k: int
    bits: int
    layout: Layout

    @property
    def bytes(self) -> int:
        """Stored bytes: bits * rows * padded k / 8."""
        return int(self.words.nbytes)


def pack(codes: ArrayLike, bits: int, layout: Layout = "blocked", threads: int = 1) -> PackedPlanes:
    """Planes of codes 0 .. 2^bits - 1, uint8 (rows, k). Raises InputError for other types, shapes, codes or bits."""
    array = np.ascontiguousarray(codes)
    if not 1 <= bits <= 8:
        raise InputError(f"Bit planes are packed from codes of 1 to 8 bits, not {bits}.")
    if array.dtype != np.uint8 or array.ndim != 2 or not array.size:
        raise InputError(f"Codes are uint8 (rows, k) with at least one value, not {array.dtype} {array.shape}.")
    if bits < 8 and int(array.max()) >> bits:
        raise InputError(f"Codes up to {int(array.max())} do not fit {bits} bits.")
    if layout not in ("plane", "blocked"):
        raise InputError(f"Layouts are plane and blocked, not {layout!r}.")
    rows, k = array.shape
    words = -(-k // _WORD) * (_WORD // 64)
    shape = (rows, bits, words) if layout == "blocked" else (bits, rows, words)
    made = np.zeros(shape, np.uint64)
    _native.pack_planes(array, layout == "blocked", threads, made)
    return PackedPlanes(made, rows, k, bits, layout)


def unpack(planes: PackedPlanes) -> NDArray[np.uint8]:
    """The codes (rows, k) again."""
    words = planes.words if planes.layout == "blocked" else planes.words.transpose(1, 0, 2)
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")[..., : planes.k]
    return np.asarray(
        (bits.astype(np.uint8) << np.arange(planes.bits, dtype=np.uint8)[:, None]).sum(axis=1, dtype=np.uint8)
    )


def matmul(
    w: PackedPlanes, a: PackedPlanes, threads: int = 1, form: Form = "xor", path: str | None = None
) -> NDArray[np.int32]:
    """Exact product of the bipolar integers of w (m, k) and a (n, k): int32 (m, n).

    `form` "and" gives the same from ANDs and row sums, for machines without one-bit XOR products. `path`: one of
    `PATHS`, by default the fastest of this CPU. Raises InputError for operands of another k, sums that could leave
    int32, and paths this CPU has not.
    """
    if w.k != a.k:
        raise InputError(f"Operands of k = {w.k} and {a.k} do not multiply.")
    largest = w.k * ((1 << w.bits) - 1) * ((1 << a.bits) - 1)
    if largest >= 1 << 31:
        raise InputError(f"Sums of {w.bits} x {a.bits} bit products over k = {w.k} could leave int32; split k.")
    fastest = _native.bit_plane_path()
    if form not in ("xor", "and") or (
        path is not None and (path not in PATHS or PATHS.index(path) < PATHS.index(fastest))
    ):
        raise InputError(
            f"Form {form!r} on path {path!r} asked for; forms are xor, and; this CPU has {fastest} and below."
        )
    out = np.empty((w.rows, a.rows), np.int32)
    _native.bit_plane_matmul(
        w.words,
        w.layout == "blocked",
        a.words,
        a.layout == "blocked",
        w.k,
        form == "xor",
        path or fastest,
        threads,
        out,
    )
    return out


@dataclass(frozen=True)
class ConvertedOperand:
    """A linear quantiser's tensor as bipolar codes: value = scale * bipolar integer + offset."""

    codes: NDArray[np.uint8]
    bits: int
    scale: float
    offset: float


def from_signed(v: ArrayLike, bits: int, scale: float, zero: float = 0.0) -> ConvertedOperand:
    """Signed integers v of `bits` bits, standing for scale * v + zero, losslessly as v' = 2 v + 1: the top bit of the
    two's complement pattern flipped, scale / 2, offset zero - scale / 2. Raises InputError for v out of range."""
    array = np.asarray(v)
    half = 1 << (bits - 1)
    if not 1 <= bits <= 8 or array.min() < -half or array.max() >= half:
        raise InputError(f"Values from {array.min()} to {array.max()} are no signed integers of {bits} bits.")
    return ConvertedOperand((array + half).astype(np.uint8), bits, scale / 2, zero - scale / 2)


def affine_matmul(w: ConvertedOperand, a: ConvertedOperand, threads: int = 1) -> NDArray[np.float64]:
    """The product of two converted tensors (m, k) and (n, k), offsets included: row sums of integers correct them."""
    k = w.codes.shape[1]
    product = matmul(pack(w.codes, w.bits), pack(a.codes, a.bits), threads).astype(np.float64)
    w_sums, a_sums = (2 * side.codes.astype(np.int64).sum(axis=1) - k * ((1 << side.bits) - 1) for side in (w, a))
    return np.asarray(
        product * (w.scale * a.scale) + w.offset * a.scale * a_sums[None] + a.offset * w.scale * w_sums[:, None]
        + k * w.offset * a.offset
    )  # fmt: skip


@dataclass(frozen=True)
class Tiling:
    """What a product does: steps of 512 positions, in tiles of rows x columns, for every pair of planes."""

    m: int
    n: int
    k: int
    w_bits: int
    a_bits: int
    tile: tuple[int, int]

    @property
    def steps(self) -> int:
        """512-position XOR, popcount and addition triples."""
        return self.m * self.n * -(-self.k // _WORD) * self.w_bits * self.a_bits

    @property
    def bytes_read(self) -> int:
        """Packed operands, each read from memory once."""
        return (self.m * self.w_bits + self.n * self.a_bits) * -(-self.k // _WORD) * _WORD // 8

    @property
    def bytes_written(self) -> int:
        """The int32 result; no intermediate planes."""
        return 4 * self.m * self.n


def tiling(m: int, n: int, k: int, w_bits: int, a_bits: int) -> Tiling:
    """The tiling `matmul` uses: 4 x 4 results in registers, 4 x 1 where there are fewer than 4 columns.

    Raises InputError for sizes below 1 and widths outside 1..8.
    """
    if min(m, n, k) < 1 or not (1 <= w_bits <= 8 and 1 <= a_bits <= 8):
        raise InputError(f"Products of ({m}, {k}) x ({n}, {k}) at {w_bits} x {a_bits} bits are not defined.")
    return Tiling(m, n, k, w_bits, a_bits, (4, 4 if n >= 4 else 1))


@dataclass(frozen=True)
class Prediction:
    """Seconds a product is limited to by one-bit products and by memory."""

    compute_s: float
    memory_s: float

    @property
    def time_s(self) -> float:
        """The larger of both."""
        return max(self.compute_s, self.memory_s)


def predict(plan: Tiling, one_bit_macs_per_s: float, bytes_per_s: float) -> Prediction:
    """Time of a plan on a machine of that rate of one-bit multiply-accumulates (p * q of them per product)."""
    if min(one_bit_macs_per_s, bytes_per_s) <= 0:
        raise InputError("Rates are positive.")
    padded = -(-plan.k // _WORD) * _WORD
    work = plan.m * plan.n * padded * plan.w_bits * plan.a_bits
    return Prediction(work / one_bit_macs_per_s, (plan.bytes_read + plan.bytes_written) / bytes_per_s)


# Dense peaks by operand width, operations/s, and memory bandwidth, bytes/s (vendor data sheets).
GPUS: dict[str, dict[str, float]] = {
    "RTX 3090": {"int8": 284e12, "int4": 568e12, "binary": 2272e12, "bytes_per_s": 936e9},
    "RTX 4090": {"int8": 660.6e12, "int4": 1321.2e12, "binary": 5285e12, "bytes_per_s": 1008e9},
}


def gpu_speed_up(gpu: str, m: int, n: int, k: int, w_bits: int, a_bits: int, peer: str = "int4") -> dict[str, float]:
    """Predicted time of one-bit products over that of a dense `peer` product ("int8", "int4") on a GPU, both at their
    peaks: {"compute": .., "memory": .., "speed_up": ..} ratios peer / ours. Raises InputError for unknown names."""
    if gpu not in GPUS or peer not in ("int8", "int4"):
        raise InputError(f"GPUs are {', '.join(GPUS)}, peers int8 and int4; not {gpu!r}, {peer!r}.")
    rates = GPUS[gpu]
    ours = predict(tiling(m, n, k, w_bits, a_bits), rates["binary"] / 2, rates["bytes_per_s"])
    bits = int(peer[3:])
    compute = 2.0 * m * n * k / rates[peer]
    memory = ((m + n) * k * bits / 8 + 4 * m * n) / rates["bytes_per_s"]
    return {
        "compute": compute / ours.compute_s, "memory": memory / ours.memory_s,
        "speed_up": max(compute, memory) / ours.time_s,
    }  # fmt: skip


def measure_rate(threads: int = 1, repeats: int = 9) -> dict[str, Any]:
    """One-bit multiply-accumulates per second of this CPU's path, on planes that stay in the cache (median)."""
    from time import perf_counter

    codes = np.random.default_rng(0).integers(0, 2, (256, 4096)).astype(np.uint8)
    planes = pack(codes, 1)
    times = []
    for _ in range(repeats):
        start = perf_counter()
        matmul(planes, planes, threads)
        times.append(perf_counter() - start)
    return {"path": _native.bit_plane_path(), "one_bit_macs_per_s": 256 * 256 * 4096 / float(np.median(times))}
