"""Products of unstructured sparse weights with few columns of activations: loaded as sparse, computed as dense.

Weights that were pruned without a pattern stay compressed in memory and become dense tiles on chip, where zeros are
multiplied too: with few tokens a product is limited by the bytes of its weights. Three forms of float16 weights (m, k):

- `TiledCSL`: the published one. A 32-bit word per weight, ordered so that the 32 lanes of a GPU's warp write to
  different banks; tiles of 128 x 64. On a CPU the words are spread in a tile in the L1 cache.
- `BitmapTiles`: a bit per weight and the packed numbers, expanded in registers; smaller than the words above 6 %
  density, and faster on a CPU.
- `BlockedCSR`: rows of blocks of 512 columns, multiplied as sparse, for more columns of activations.

Sources: arXiv 2309.10285 (tiled form, order, kernel); the bitmap is the sheet of its followers (SpInfer), with tiles of
16 x 4 instead of 8 x 8: 16 rows are one vector of float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels import threads as native_threads
from bitwright.kernels.threads import thread_count
from bitwright.kernels.work import Work

PATHS = ("avx512", "portable")
TILE = (128, 64)
LANES, VECTOR, BANKS = 32, 4, 32  # of a warp; words of a 16-byte load; banks of shared memory
REGISTER_BUDGET = 4096  # words of a tile that the published kernel's threads hold in registers (128 x 64 at 50 %)
BLOCK_COLUMNS = 512  # of BlockedCSR: with 16 columns of activations 32 KiB of them
_SPARE = 32  # numbers and columns behind the last: reads of whole vectors stay inside


def usable_path(path: str | None = None) -> str:
    """The instruction set of `PATHS` asked for, or the fastest of this CPU; see `threads.usable_path`."""
    return native_threads.usable_path(path, PATHS, _native.sparse_path(), "sparse products")


@dataclass(frozen=True)
class TiledCSL:
    """float16 weights (m, k) in tiles of 128 x 64, a 32-bit word per weight that is not 0.

    Word: the float16 number in the low half; in the high half its place row * 64 + (column XOR row mod 8 * 8), where a
    kernel writes it in shared memory. `offsets` counts vectors of 4 words (tiles + 2 of them, the last twice, so that
    the next tile's can be read early); tiles go along k first. Each tile is filled to whole vectors with zeros that
    have the place of a zero. Tiles with more words than the register budget are kept dense: `dense` (n, 128, 64), and
    `slot` (tiles,) says where (-1: not). m and k are padded to whole tiles: `padded`.
    """

    shape: tuple[int, int]
    offsets: NDArray[np.uint32]
    words: NDArray[np.uint32]
    slot: NDArray[np.int32]
    dense: NDArray[np.float16]
    reordered: bool

    @classmethod
    def from_dense(
        cls, weights: Any, tile: tuple[int, int] = TILE, reorder: bool = True, most_words: int = REGISTER_BUDGET,
        threads: int | None = None,
    ) -> TiledCSL:  # fmt: skip
        """Weights (m, k) in this form. Every bit pattern other than +0 is stored, NaN included.

        `reorder` puts a tile's words in an order that spreads the banks of 32 lanes (else they stay row by row).
        Warns when the form is larger than dense float16 (fewer than half are zeros). Raises InputError for other tiles,
        types and shapes, float32 numbers beyond float16, and forms of 2^32 vectors.
        """
        if tile != TILE:
            raise InputError(f"Tiles of {tile} asked for; the form has tiles of {TILE}.")
        w, shape = _halves(weights, TILE)
        tiles = w.shape[0] // TILE[0] * (w.shape[1] // TILE[1])
        if w.size >= 1 << 34:
            raise InputError(f"{w.size} weights may overflow the 32-bit offsets; split them.")
        offsets, full, workers = np.empty(tiles + 2, np.uint32), np.empty(tiles, np.uint8), thread_count(threads)
        _native.tiled_words_pack(w, reorder, most_words, workers, offsets, full, np.empty(0, np.uint32))
        words = np.empty(int(offsets[-1]) * VECTOR, np.uint32)
        if len(words):
            _native.tiled_words_pack(w, reorder, most_words, workers, offsets, full, words)
        slot = np.full(tiles, -1, np.int32)
        slot[full > 0] = np.arange(np.count_nonzero(full))
        at, across = np.nonzero(full)[0], w.shape[1] // TILE[1]
        view = w.reshape(-1, TILE[0], across, TILE[1]).swapaxes(1, 2)
        dense = np.ascontiguousarray(view[at // across, at % across]).view(np.float16)
        made = cls(shape, offsets, words, slot, dense.reshape(-1, *TILE), reorder)
        if made.nbytes > 2 * w.size:
            share = np.count_nonzero(w) / w.size
            warnings.warn(
                f"{100 * share:.0f} % of the weights are not 0: {made.nbytes} bytes in 32-bit words, {2 * w.size} as "
                "dense float16. Words pay below 50 %.",
                stacklevel=2,
            )
        return made

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns with those that fill the last tiles."""
        return _padded(self.shape, TILE)

    @property
    def nbytes(self) -> int:
        """Bytes of words, offsets and dense tiles: 4 (weights + filling) + 4 (tiles + 2) without dense ones."""
        return int(self.words.nbytes + self.offsets.nbytes + self.dense.nbytes)

    @property
    def densest(self) -> int:
        """Words of the fullest tile, those kept dense left out: what a kernel's registers must hold."""
        return int(np.diff(self.offsets.astype(np.int64)).max()) * VECTOR

    def to_dense(self) -> NDArray[np.float16]:
        """The weights (m, k) again, bit by bit."""
        rows, columns = self.padded
        flat = np.zeros((len(self.slot), TILE[0] * TILE[1]), np.uint16)
        at = np.repeat(
            np.arange(len(self.slot)), (VECTOR * np.diff(self.offsets[:-1].astype(np.int64))).astype(np.int64)
        )
        place, value = (self.words >> 16).astype(np.int64), (self.words & 0xFFFF).astype(np.uint16)
        row, column = place // TILE[1], place % TILE[1]
        flat[at, row * TILE[1] + (column ^ (row % 8 * 8))] = value
        tiles = flat.view(np.float16).reshape(-1, *TILE)
        tiles[self.slot >= 0] = self.dense
        whole = tiles.reshape(rows // TILE[0], -1, *TILE).swapaxes(1, 2).reshape(rows, columns)
        return np.ascontiguousarray(whole[: self.shape[0], : self.shape[1]])

    def conflicts(self) -> float:
        """Wavefronts of shared memory per store of 32 lanes: 1 without bank conflicts, at most 32. Lanes that write to
        the same 32-bit word do not conflict. Evidence: simulated."""
        wavefronts, stores = _native.tiled_words_conflicts(self.offsets, self.words)
        return wavefronts / stores if stores else 1.0


@dataclass(frozen=True)
class BitmapTiles:
    """float16 weights (m, k): for 16 rows and each column a mask of 16 bits, so 64 bits for a tile of 16 x 4; the
    numbers of the set bits in the order of columns, those of block i from `start[i]`. Bytes per weight: density * 2 +
    1/8. m is padded to 16 rows, k to 64 columns."""

    shape: tuple[int, int]
    masks: NDArray[np.uint16]
    start: NDArray[np.int64]
    values: NDArray[np.uint16]

    @classmethod
    def from_dense(cls, weights: Any) -> BitmapTiles:
        """Weights (m, k) in this form, bit by bit. Raises InputError as `TiledCSL.from_dense`."""
        w, shape = _halves(weights, (16, 64))
        masks, start = np.empty((w.shape[0] // 16, w.shape[1]), np.uint16), np.empty(w.shape[0] // 16 + 1, np.int64)
        _native.bitmap_pack(w, masks, start, np.empty(0, np.uint16))
        values = np.zeros(int(start[-1]) + _SPARE, np.uint16)
        _native.bitmap_pack(w, masks, start, values)
        return cls(shape, masks, start, values)

    @property
    def nbytes(self) -> int:
        """Bytes of masks, numbers and block starts."""
        return int(self.masks.nbytes + self.values.nbytes + self.start.nbytes)

    def to_dense(self) -> NDArray[np.float16]:
        """The weights (m, k) again, bit by bit."""
        blocks, k = self.masks.shape
        bits = (self.masks[..., None] >> np.arange(16, dtype=np.uint16)) & 1  # (blocks, k, 16)
        whole = np.zeros((blocks, k, 16), np.uint16)
        whole[bits > 0] = self.values[:-_SPARE]
        dense = whole.swapaxes(1, 2).reshape(blocks * 16, k)[: self.shape[0], : self.shape[1]]
        return np.ascontiguousarray(dense).view(np.float16)


@dataclass(frozen=True)
class BlockedCSR:
    """float16 weights (m, k) as CSR of blocks of 512 columns: row r of block b is row b * m + r of `start`; `index`
    counts columns from the block's first. 4 bytes per weight that is not 0, and 8 per row of a block."""

    shape: tuple[int, int]
    start: NDArray[np.int64]
    index: NDArray[np.uint16]
    values: NDArray[np.uint16]

    @classmethod
    def from_dense(cls, weights: Any) -> BlockedCSR:
        """Weights (m, k) in this form, bit by bit. Raises InputError as `TiledCSL.from_dense`."""
        w, shape = _halves(weights, (1, BLOCK_COLUMNS))
        rows = w.reshape(shape[0], -1, BLOCK_COLUMNS).swapaxes(0, 1).reshape(-1, BLOCK_COLUMNS)
        at, column = np.nonzero(rows)
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.bincount(at, minlength=len(rows)), out=start[1:])
        index, values = (np.zeros(len(column) + _SPARE, np.uint16) for _ in range(2))
        index[:-_SPARE], values[:-_SPARE] = column, rows[at, column]
        return cls(shape, start, index, values)

    @property
    def nbytes(self) -> int:
        """Bytes of numbers, columns and row starts."""
        return int(self.values.nbytes + self.index.nbytes + self.start.nbytes)

    def to_dense(self) -> NDArray[np.float16]:
        """The weights (m, k) again, bit by bit."""
        rows = np.zeros((len(self.start) - 1, BLOCK_COLUMNS), np.uint16)
        rows[np.repeat(np.arange(len(rows)), np.diff(self.start)), self.index[:-_SPARE]] = self.values[:-_SPARE]
        whole = rows.reshape(-1, self.shape[0], BLOCK_COLUMNS).swapaxes(0, 1).reshape(self.shape[0], -1)
        return np.ascontiguousarray(whole[:, : self.shape[1]]).view(np.float16)


def matmul(
    weights: TiledCSL | BitmapTiles | BlockedCSR, b: Any, *, split_k: int | None = None, threads: int | None = None,
    path: str | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """W B float32 (m, n), kept column by column (as the published kernel does; `BlockedCSR` row by row).

    `b` (k, n) float16 or float32; products and sums are float32. `split_k` parts along k are summed in their order
    (`TiledCSL` only; default: as many as it takes to give every thread two strips of 128 rows). Raises InputError for
    other types and shapes, NaN and infinity in b, and split_k where there is none.
    """
    m, k = weights.shape
    given = np.asarray(b)
    if given.dtype not in (np.float16, np.float32) or given.ndim != 2 or not given.size or given.shape[0] != k:
        raise InputError(f"Activations are float16 or float32 ({k}, n), not {given.dtype} {given.shape}.")
    n, chosen, workers = given.shape[1], usable_path(path), thread_count(threads)
    if isinstance(weights, BlockedCSR):
        rows = -(-k // BLOCK_COLUMNS) * BLOCK_COLUMNS + 16  # whole vectors are read behind the last row
    else:
        rows = -(-k // TILE[1]) * TILE[1]
    real = np.ascontiguousarray(given, np.float32)
    if rows != k:
        real = _extended(real, rows)
    if not _native.all_finite(real.reshape(-1)):
        raise InputError("Activations hold NaN or infinity.")
    if split_k is not None and (not isinstance(weights, TiledCSL) or not 1 <= split_k <= rows // TILE[1]):
        raise InputError(f"split_k = {split_k}: TiledCSL weights have 1 to {rows // TILE[1]} parts, others none.")
    if isinstance(weights, BitmapTiles):
        out = np.empty((n, weights.masks.shape[0] * 16), np.float32)
        _native.bitmap_matmul(weights.masks, weights.start, weights.values, real, chosen, workers, out)
        return out.T[:m]
    if isinstance(weights, BlockedCSR):
        out = np.empty((m, n), np.float32)
        _native.blocked_rows_matmul(weights.start, weights.index, weights.values, real, chosen, workers, out)
        return out
    strips = weights.padded[0] // TILE[0]
    parts = split_k or min(rows // TILE[1], max(1, -(-2 * workers // strips)) if workers > 1 else 1)
    work = np.empty((parts, n, weights.padded[0]), np.float32)
    _native.tiled_words_matmul(
        weights.offsets, weights.words, weights.slot, weights.dense.view(np.uint16), real, chosen, workers, work
    )
    total: NDArray[np.float32] = work[0]
    for part in work[1:]:
        total += part
    return total.T[:m]


def work(weights: TiledCSL | BitmapTiles | BlockedCSR, n: int) -> Work:
    """What `matmul` by n columns does: products of whole tiles (rows: of stored weights, by whole vectors of 16
    columns), the stored weights read once, activations and results once. Raises InputError for n below 1."""
    if n < 1:
        raise InputError(f"{n} columns of activations asked for; expected at least one.")
    m, k = weights.shape
    if isinstance(weights, BlockedCSR):
        products, pieces = len(weights.index) * -(-n // 16) * 16, -(-m // 64)
    elif isinstance(weights, BitmapTiles):
        products, pieces = weights.masks.size * 16 * n, len(weights.masks)
    else:
        products, pieces = len(weights.slot) * TILE[0] * TILE[1] * n, weights.padded[0] // TILE[0]
    return Work({"fp32": 2.0 * products}, {"memory": weights.nbytes + 4.0 * n * (m + k)}, pieces)


def best_form(weights: Any, n: int) -> BitmapTiles | BlockedCSR:
    """The form that a CPU multiplies in the fewest cycles by n columns of activations, counted per weight: a bitmap
    expands 16 weights in some 6 cycles and multiplies them in n / 2; rows take some 2 per stored weight and 16 columns
    (measured with AVX-512). Raises InputError as `TiledCSL.from_dense` and for n below 1."""
    if n < 1:
        raise InputError(f"{n} columns of activations asked for; expected at least one.")
    stored = np.count_nonzero(weights) / max(np.size(weights), 1)
    bitmap = (6 + n / 2) / 16 < 2.2 * stored * -(-n // 16)
    return BitmapTiles.from_dense(weights) if bitmap else BlockedCSR.from_dense(weights)


def bytes_per_weight(density: float) -> dict[str, float]:
    """Bytes per weight of each form at this share of weights other than 0, row starts and filling left out; 2:4 holds
    half of the weights and 2 bits for each. Raises InputError outside of 0 to 1."""
    if not 0 <= density <= 1:
        raise InputError(f"A density of {density} is not a share from 0 to 1.")
    return {"dense": 2.0, "tiled words": 4 * density, "bitmap": 2 * density + 1 / 8, "rows": 4 * density, "2:4": 1.125}


def _extended(b: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """b with rows of zeros, from the start of a cache line: rows of 16 columns then are one line each."""
    raw = np.empty(rows * b.shape[1] + 16, np.float32)
    at = -raw.ctypes.data % 64 // 4
    made = raw[at : at + rows * b.shape[1]].reshape(rows, b.shape[1])
    made[: len(b)], made[len(b) :] = b, 0
    return made


def _padded(shape: tuple[int, int], unit: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // unit[0]) * unit[0], -(-shape[1] // unit[1]) * unit[1]


def _halves(weights: Any, unit: tuple[int, int]) -> tuple[NDArray[np.uint16], tuple[int, int]]:
    given = np.asarray(weights)
    if given.dtype not in (np.float16, np.float32) or given.ndim != 2 or not given.size:
        raise InputError(f"Weights are float16 or float32 (m, k), not {given.dtype} {given.shape}.")
    if given.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = given.astype(np.float16)
        if not np.isfinite(half).all():
            raise InputError(
                f"{np.count_nonzero(~np.isfinite(half))} weights are not finite in float16 (largest magnitude "
                f"{np.abs(given).max():.4g}; float16 ends at 65504): scale them first."
            )
        given = half
    shape = (int(given.shape[0]), int(given.shape[1]))
    rows, columns = _padded(shape, unit)
    bits = np.ascontiguousarray(given).view(np.uint16)
    if (rows, columns) != shape:
        whole = np.zeros((rows, columns), np.uint16)
        whole[: shape[0], : shape[1]] = bits
        bits = whole
    return bits, shape
