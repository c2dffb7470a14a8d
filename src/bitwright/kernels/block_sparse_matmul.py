"""Products of block-sparse int8 weights with uint8 activations, for encoders that keep activations transposed.

`BlockCSR` holds weights (out, in) in blocks of 4 outputs by 1 input: whole columns of 4 weights are kept or dropped.
Activations are (inputs, tokens), or slabs (slabs, inputs, width) of `width` consecutive tokens each, the last slab
perhaps not full: rows of a slab lie near each other, so that those the indices pick meet in the cache. Sums are exact
int32 on every path; then follow scale, bias, residual, GELU and rounding, or a layer norm over the outputs.

Source: arXiv 2306.16601; its kernel interleaves 4 picked rows of activations on the fly for the 4-way int8 dot product
(AVX-512 VNNI). Here 64 columns of 4 rows become 4 vectors by 8 unpackings, and the columns' order is set right once,
when the sums are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels import threads as native_threads
from bitwright.kernels.threads import thread_count
from bitwright.kernels.work import Work

PATHS = ("vnni", "avx2", "portable")
ROWS, GROUP, CHUNK = 4, 4, 16  # outputs of a block, inputs of a group, block rows of a piece of work
WIDEST = 96  # columns of a tile
_MOST_INPUTS = 1 << 16  # indices have 16 bits
_MOST_COLUMNS = 1 << 31
_NO_FLOATS, _NO_SCALE = np.empty((0, 0, 0), np.float32), np.empty(0, np.float32)


@cache
def usable_path(path: str | None = None) -> str:
    """The instruction set of `PATHS` asked for, or the fastest of this CPU; see `threads.usable_path`."""
    return native_threads.usable_path(path, PATHS, _native.block_sparse_path(), "block-sparse products")


@dataclass(frozen=True)
class BlockCSR:
    """int8 weights (out, in) in blocks of 4 outputs by 1 input.

    Block row b (outputs 4 b to 4 b + 3) has the groups `start[b]` to `start[b + 1]`; group g the inputs
    `index[4 g : 4 g + 4]` (uint16) and the values `value[16 g : 16 g + 16]`, the 4 of an output side by side. The last
    group of a block row is filled with zeros of input 0. `sums` (out,): sum of an output's weights; `blocks`: blocks
    that hold a weight other than 0.
    """

    shape: tuple[int, int]
    start: NDArray[np.int64]
    index: NDArray[np.uint16]
    value: NDArray[np.int8]
    sums: NDArray[np.int64]
    blocks: int

    @classmethod
    def from_dense(cls, weights: Any, block: tuple[int, int] = (4, 1), most_fill: float = 0.5) -> BlockCSR:
        """Weights (out, in) int8 in this form; outputs are padded to a multiple of 4.

        Raises InputError for other types, shapes and blocks, more than 65,536 inputs (an index has 16 bits), and where
        more than `most_fill` of the values to store are zeros: such weights were not pruned in these blocks.
        """
        w = np.asarray(weights)
        if w.dtype != np.int8 or w.ndim != 2 or not w.size:
            raise InputError(f"Weights are int8 (outputs, inputs), not {w.dtype} {w.shape}.")
        if block != (ROWS, 1):
            raise InputError(f"Blocks of {block} asked for; the kernel has blocks of (4, 1): 4 outputs by 1 input.")
        if w.shape[1] > _MOST_INPUTS:
            raise InputError(f"{w.shape[1]} inputs overflow the 16-bit index; split them in parts of {_MOST_INPUTS}.")
        outputs = w.shape[0]
        kept = np.add.reduceat(w != 0, np.arange(0, outputs, ROWS), axis=0, dtype=np.int64)
        blocks, values = int(np.count_nonzero(kept)), int(kept.sum())
        stored = int(np.minimum(ROWS, outputs - ROWS * np.arange(len(kept))) @ (kept > 0).sum(1))
        if stored and 1 - values / stored > most_fill:
            raise InputError(
                f"{100 * values / w.size:.1f} % of the weights are not 0, but {100 * stored / w.size:.1f} % lie in "
                "(4, 1) blocks with such a weight: not pruned in these blocks. Prune with "
                "bitwright.compression.block_pruning, or accept the loss with most_fill=1."
            )
        start = np.empty(len(kept) + 1, np.int64)
        w = np.ascontiguousarray(w)
        _native.block_sparse_pack(w, start, np.empty(0, np.uint16), np.empty(0, np.int8))
        index, value = np.empty(int(start[-1]) * GROUP, np.uint16), np.empty(int(start[-1]) * GROUP * ROWS, np.int8)
        if len(index):
            _native.block_sparse_pack(w, start, index, value)
        return cls((outputs, w.shape[1]), start, index, value, w.sum(1, dtype=np.int64), blocks)

    def to_dense(self) -> NDArray[np.int8]:
        """The weights (out, in) again."""
        rows = len(self.start) - 1
        dense = np.zeros((rows, ROWS, self.shape[1]), np.int16)  # padding adds 0 to input 0
        at = np.repeat(np.arange(rows), np.diff(self.start))
        values = self.value.reshape(-1, ROWS, GROUP)
        for place in range(GROUP):
            # inputs of a block row differ, but for the filling: zeros added to input 0
            np.add.at(dense.swapaxes(1, 2), (at, self.index[place::GROUP].astype(np.int64)), values[:, :, place])
        return dense.reshape(rows * ROWS, -1)[: self.shape[0]].astype(np.int8)

    @property
    def nbytes(self) -> int:
        """Bytes of values, indices and row starts."""
        return int(self.value.nbytes + self.index.nbytes + self.start.nbytes)

    @property
    def groups(self) -> int:
        """Groups of 4 inputs over all block rows."""
        return int(self.start[-1])

    @cached_property
    def no_sums(self) -> NDArray[np.int32]:
        """Zeros (outputs padded to a multiple of 4): what sums start from without a zero point."""
        return np.zeros((len(self.start) - 1) * ROWS, np.int32)

    @property
    def density(self) -> float:
        """Share of (4, 1) blocks that are kept."""
        return self.blocks / ((len(self.start) - 1) * self.shape[1])


@dataclass(frozen=True)
class Rounding:
    """Codes round(y / scale) + zero_point, cut to int8 (`signed`) or uint8. Raises InputError for unusable values."""

    scale: float
    zero_point: int = 0
    signed: bool = False

    def __post_init__(self) -> None:
        low, high = (-128, 127) if self.signed else (0, 255)
        if not (np.isfinite(self.scale) and self.scale > 1e-30) or not low <= self.zero_point <= high:
            raise InputError(
                f"Codes of scale {self.scale} and zero point {self.zero_point}; expected a positive scale and a zero "
                f"point from {low} to {high}."
            )

    @property
    def dtype(self) -> type:
        """numpy's type of the codes."""
        return np.int8 if self.signed else np.uint8

    def codes(self, x: Any) -> NDArray[Any]:
        """Codes of numbers, ties to even."""
        low, high = (-128, 127) if self.signed else (0, 255)
        codes = np.rint(np.asarray(x, np.float64) / self.scale) + self.zero_point
        made: NDArray[Any] = np.clip(codes, low, high).astype(self.dtype)
        return made


def aligned_zeros(shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    """Zeros from the start of a cache line on: 64 columns of a row are then one line, not parts of two."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    raw = np.zeros(size + 64, np.uint8)
    at = -raw.ctypes.data % 64
    made: NDArray[Any] = raw[at : at + size].view(kind).reshape(shape)
    return made


def to_slabs(x: NDArray[Any], width: int) -> NDArray[Any]:
    """A matrix (rows, tokens) as slabs (slabs, rows, width), the last one filled up with zeros."""
    if x.ndim != 2 or not x.size or width < 1:
        raise InputError(f"A matrix (rows, tokens) is cut into slabs of some columns; given {x.shape}, width {width}.")
    slabs = -(-x.shape[1] // width)
    made = aligned_zeros((slabs, x.shape[0], width), x.dtype)
    for slab in range(slabs):
        part = x[:, slab * width : (slab + 1) * width]
        made[slab, :, : part.shape[1]] = part
    return made


def from_slabs(x: NDArray[Any], tokens: int) -> NDArray[Any]:
    """The matrix (rows, tokens) that slabs (slabs, rows, width) hold."""
    return np.ascontiguousarray(x.transpose(1, 0, 2).reshape(x.shape[1], -1)[:, :tokens])


def slab_width(tokens: int) -> int:
    """Columns of a slab: 64, so that a row is one cache line and rows fill all sets of a cache; 128 for 65 to 96
    tokens, which are one tile; 16 or 32 for so few, which never lie in two lines. Raises InputError for fewer than one
    token."""
    if tokens < 1:
        raise InputError(f"{tokens} tokens asked for; expected at least one.")
    if tokens <= 32:
        return 16 if tokens <= 16 else 32
    return 128 if 64 < tokens <= WIDEST else 64


def work(weights: BlockCSR, tokens: int) -> Work:
    """What `matmul` does: dot products of whole groups by whole vectors of 16 columns, the weights read once and int32
    results written once; a piece is a chunk of 16 block rows by a tile. Raises InputError for tokens below 1."""
    if tokens < 1:
        raise InputError(f"{tokens} tokens asked for; expected at least one.")
    columns, tiles = -(-tokens // 16) * 16, -(-tokens // 64)
    moved = weights.nbytes + (weights.shape[1] + 4 * weights.shape[0]) * tokens
    chunks = -(-(len(weights.start) - 1) // CHUNK)
    return Work({"matrix int8": 2.0 * ROWS * GROUP * weights.groups * columns}, {"memory": moved}, chunks * tiles)


def matmul(
    weights: BlockCSR, a: NDArray[np.uint8], *, scale: Any = None, bias: Any = None, zero_point: int = 0,
    add: NDArray[np.float32] | None = None, gelu: bool = False, rounding: Rounding | None = None,
    tokens: int | None = None, threads: int | None = None, path: str | None = None, out: NDArray[Any] | None = None,
) -> NDArray[Any]:  # fmt: skip
    """W (A - zero_point) with `weights` W (out, in) and uint8 activations A (in, tokens), or slabs of them.

    Without `scale` the exact int32 sums (out, tokens). With it (a number or one per output) float32
    y = sum * scale + bias + add, then GELU, and with `rounding` int8 or uint8 codes. `add` and the result are laid out
    as A; `tokens` is how many columns of slabs are real (default all). `out`: where to write, else a new array; columns
    beyond `tokens` are left as they are (0 in a new array).

    Raises InputError for other types and shapes, not contiguous arrays, an epilogue without scale, NaN and infinity in
    scale and bias, and sums that may leave int32.
    """
    slabs, tokens = _slabs(weights, a, tokens)
    first = _first_sums(weights, zero_point)
    if scale is None and (bias is not None or add is not None or gelu or rounding is not None):
        raise InputError("Bias, residual, GELU and rounding need the activations' and weights' scale: give `scale`.")
    kind = np.int32 if scale is None else rounding.dtype if rounding else np.float32
    shape = (slabs.shape[0], weights.shape[0], slabs.shape[2])
    result, real = _result(out, shape, a.ndim, kind), _addend(add, shape, a.ndim)
    _native.block_sparse_matmul(
        weights.start, weights.index, weights.value, weights.shape[0], tokens, slabs, first,
        _per_output(scale, weights, "scale"), _bias(bias, scale, weights), real, gelu,
        1 / rounding.scale if rounding else 1.0, float(rounding.zero_point) if rounding else 0.0, _NO_FLOATS,
        usable_path(path), thread_count(threads), result,
    )  # fmt: skip
    return result[0] if a.ndim == 2 else result


def matmul_norm(
    weights: BlockCSR, a: NDArray[np.uint8], *, scale: Any, bias: Any = None, zero_point: int = 0,
    add: NDArray[np.float32] | None = None, gain: Any, offset: Any, epsilon: float = 1e-12,
    rounding: Rounding | None = None, tokens: int | None = None, threads: int | None = None, path: str | None = None,
) -> tuple[NDArray[np.float32], NDArray[Any] | None]:  # fmt: skip
    """Layer norm over the outputs of the product and `add`, as float32 and (with `rounding`) as codes; see `matmul`.

    Mean and squared differences of a column are gathered while blocks of outputs are made, merged (Chan et al. 1979),
    and one pass writes both results: activations are never transposed. Raises InputError as `matmul`.
    """
    slabs, tokens = _slabs(weights, a, tokens)
    if not epsilon > 0:
        raise InputError(f"The norm's epsilon is {epsilon}; expected above 0.")
    shape = (slabs.shape[0], weights.shape[0], slabs.shape[2])
    x, real = aligned_zeros(shape, np.float32), _addend(add, shape, a.ndim)
    chunks, workers = -(-(len(weights.start) - 1) // CHUNK), thread_count(threads)
    statistics = np.empty((2, chunks, shape[0] * shape[2]), np.float32)
    _native.block_sparse_matmul(
        weights.start, weights.index, weights.value, weights.shape[0], tokens, slabs,
        _first_sums(weights, zero_point), _per_output(scale, weights, "scale"), _bias(bias, scale, weights), real,
        False, 1.0, 0.0, statistics, usable_path(path), workers, x,
    )  # fmt: skip
    codes = aligned_zeros(shape if rounding else (0, 0, 0), np.uint8)
    _native.normalise_columns(
        x, statistics, _per_output(gain, weights, "gain"), _per_output(offset, weights, "offset"), epsilon,
        1 / rounding.scale if rounding else 1.0, float(rounding.zero_point) if rounding else 0.0,
        bool(rounding and rounding.signed), codes, workers,
    )  # fmt: skip
    made: NDArray[Any] | None = codes.view(rounding.dtype) if rounding else None
    if a.ndim == 2:
        return x[0], None if made is None else made[0]
    return x, made


def attention(
    q: NDArray[np.uint8], k: NDArray[np.int8], v: NDArray[np.int8], sequences: Any, heads: int, *, q_zero_point: int,
    score_scale: float, value_scale: float, rounding: Rounding, threads: int | None = None, path: str | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Transposed attention on codes: V^T softmax over keys of score_scale * (K (Q - q_zero_point)).

    q, k, v are slabs (slabs, heads * channels, width); `sequences` (n, 3) int64 names slab, first column and columns of
    each. Scores are exact int32, exponentials float32, probabilities uint8 with scale 1/255. `value_scale` is that of
    v; `rounding` makes the uint8 result, laid out as q (columns of no sequence hold the zero point).

    Raises InputError for other types and shapes, channels of a head that are no multiple of 4, sequences outside of
    their slab.
    """
    spans = _sequences(sequences, q.shape, heads)
    for name, array, kind in (("q", q, np.uint8), ("k", k, np.int8), ("v", v, np.int8)):
        if array.dtype != kind or array.shape != q.shape or not array.flags.c_contiguous:
            raise InputError(f"{name} is contiguous {np.dtype(kind)} {q.shape}, not {array.dtype} {array.shape}.")
    if (q.shape[1] // heads) % 4 or rounding.signed or not 0 <= q_zero_point <= 255:
        raise InputError("The attention kernel takes heads of multiples of 4 channels, and gives uint8 codes.")
    if not (np.isfinite(score_scale) and np.isfinite(value_scale)):
        raise InputError(f"Scales of scores and values are {score_scale} and {value_scale}; expected finite ones.")
    out = aligned_zeros(q.shape, np.uint8)
    out.fill(rounding.zero_point)
    _native.transposed_attention(
        q, q_zero_point, k, v, spans, heads, score_scale, value_scale / 255 / rounding.scale,
        float(rounding.zero_point), usable_path(path), thread_count(threads), out,
    )  # fmt: skip
    return out


def attention_float(
    q: NDArray[np.float32], k: NDArray[np.float32], v: NDArray[np.float32], sequences: Any, heads: int, *,
    scale: float, threads: int | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """Transposed attention in float32, laid out as in `attention` (columns of no sequence are 0). Raises as there."""
    spans = _sequences(sequences, q.shape, heads)
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.dtype != np.float32 or array.shape != q.shape or not array.flags.c_contiguous:
            raise InputError(f"{name} is contiguous float32 {q.shape}, not {array.dtype} {array.shape}.")
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds NaN or infinity.")
    out = np.zeros(q.shape, np.float32)
    _native.transposed_attention_float(q, k, v, spans, heads, scale, thread_count(threads), out)
    return out


def _slabs(weights: BlockCSR, a: NDArray[np.uint8], tokens: int | None) -> tuple[NDArray[np.uint8], int]:
    if not isinstance(a, np.ndarray) or a.dtype != np.uint8 or a.ndim not in (2, 3) or not a.size:
        kind = f"{a.dtype} {a.shape}" if isinstance(a, np.ndarray) else type(a).__name__
        raise InputError(f"Activations are uint8 (inputs, tokens) or (slabs, inputs, width), not {kind}.")
    slabs = a[None] if a.ndim == 2 else a
    if slabs.shape[1] != weights.shape[1]:
        raise InputError(f"Activations {a.shape} have {slabs.shape[1]} inputs; the weights have {weights.shape[1]}.")
    if not a.flags.c_contiguous:
        raise InputError("Activations are not contiguous; copy them with numpy.ascontiguousarray.")
    room = slabs.shape[0] * slabs.shape[2]
    if room >= _MOST_COLUMNS:
        raise InputError(f"{room} tokens asked for; the kernel takes fewer than 2^31.")
    if tokens is None:
        return slabs, room
    if not room - slabs.shape[2] < tokens <= room:
        raise InputError(f"{tokens} tokens do not end in the last of the slabs {slabs.shape}.")
    return slabs, tokens


def _first_sums(weights: BlockCSR, zero_point: int) -> NDArray[np.int32]:
    if not 0 <= zero_point <= 255:
        raise InputError(f"The activations' zero point is {zero_point}; expected 0 to 255.")
    if not zero_point:
        return weights.no_sums
    # 65,536 inputs * 255 * 128 = 2,139,095,040 < 2^31; a zero point only moves the range
    first = np.zeros_like(weights.no_sums)
    first[: weights.shape[0]] = -zero_point * weights.sums
    return first


def _per_output(given: Any, weights: BlockCSR, what: str) -> NDArray[np.float32]:
    if given is None:
        return _NO_SCALE
    values = np.asarray(given, np.float32)
    if values.shape not in ((), (weights.shape[0],)) or not np.isfinite(values).all():
        raise InputError(f"The {what} is a finite number or one for each of {weights.shape[0]} outputs.")
    return np.ascontiguousarray(np.broadcast_to(values, (weights.shape[0],)))


def _bias(bias: Any, scale: Any, weights: BlockCSR) -> NDArray[np.float32]:
    return _per_output(0.0 if bias is None and scale is not None else bias, weights, "bias")


def _addend(add: NDArray[np.float32] | None, shape: Sequence[int], ndim: int) -> NDArray[np.float32]:
    if add is None:
        return _NO_FLOATS
    expected = tuple(shape[-ndim:])
    if add.dtype != np.float32 or add.shape != expected or not add.flags.c_contiguous:
        raise InputError(f"What is added is contiguous float32 {expected}, not {add.dtype} {add.shape}.")
    return add[None] if ndim == 2 else add


def _result(out: NDArray[Any] | None, shape: Sequence[int], ndim: int, kind: Any) -> NDArray[Any]:
    expected = tuple(shape[-ndim:])
    if out is None:
        return aligned_zeros(tuple(shape), kind)
    if out.dtype != kind or out.shape != expected or not (out.flags.c_contiguous and out.flags.writeable):
        raise InputError(f"The result is contiguous {np.dtype(kind)} {expected}, not {out.dtype} {out.shape}.")
    return out[None] if ndim == 2 else out


def _sequences(given: Any, shape: Sequence[int], heads: int) -> NDArray[np.int64]:
    if len(shape) != 3 or heads < 1 or shape[1] % heads:
        raise InputError(f"q, k and v are slabs (slabs, heads * channels, width); {shape} has no {heads} heads.")
    spans = np.ascontiguousarray(given, np.int64)
    if spans.ndim != 2 or spans.shape[1] != 3 or not len(spans):
        raise InputError(f"Sequences are (n, 3): slab, first column, columns; not {spans.shape}.")
    slab, begin, count = spans.T
    if not ((slab >= 0) & (slab < shape[0]) & (begin >= 0) & (count >= 1) & (begin + count <= shape[2])).all():
        raise InputError(f"A sequence lies outside of the slabs {tuple(shape)}.")
    return spans
