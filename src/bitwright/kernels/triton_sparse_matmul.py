"""The product of tiled words (arXiv 2309.10285) as a Triton kernel: load as sparse, compute as dense.

A program makes 128 rows by some columns of the result. Along k it loads the words of one tile of 128 x 64, scatters
their numbers to a dense tile, and multiplies that by the activations on the matrix unit. Triton has no shared memory
that a program addresses, so the dense tile lies in global memory (the second-level cache) and the order of banks brings
nothing; everything else is the published kernel's. Needs triton; runs on a GPU, or anywhere with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from bitwright.core.errors import InputError
from bitwright.kernels.sparse_matmul import TILE, TiledCSL

_COLUMNS = 16  # of a program: the narrowest that matrix units take


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _words_kernel(  # type: ignore[no-untyped-def]
    offsets, words, b, out, tile, columns, n, m,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    strip, part = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, ROWS * DEPTH)
    rows, depth, width = tl.arange(0, ROWS), tl.arange(0, DEPTH), part * WIDTH + tl.arange(0, WIDTH)
    own = tile + (strip * tl.num_programs(1) + part) * ROWS * DEPTH
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for column in range(columns):
        first = tl.load(offsets + strip * columns + column) * 4
        last = tl.load(offsets + strip * columns + column + 1) * 4
        tl.store(own + place, tl.zeros((ROWS * DEPTH,), tl.float16))
        tl.debug_barrier()
        lane = tl.arange(0, WORDS)
        for start in range(first, last, WORDS):
            there = start + lane < last
            word = tl.load(words + start + lane, mask=there, other=0)
            at = (word >> 16) & (ROWS * DEPTH - 1)
            row = at // DEPTH
            plain = row * DEPTH + ((at % DEPTH) ^ (row % 8 * 8))
            value = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
            tl.store(own + plain, value, mask=there)
        tl.debug_barrier()
        dense = tl.load(own + rows[:, None] * DEPTH + depth[None, :])
        inner = column * DEPTH + depth
        x = tl.load(b + inner[:, None] * n + width[None, :], mask=width[None, :] < n, other=0.0)
        total += tl.dot(dense, x)
    where = strip * ROWS + rows
    tl.store(out + width[None, :] * m + where[:, None], total, mask=width[None, :] < n)


def matmul(weights: TiledCSL, b: Any) -> Any:
    """W B float32 (m, n) of activations (k, n) float16, a torch tensor on the GPU (or, interpreted, on the CPU).

    Raises InputError for other types and shapes, and weights with tiles that were kept dense."""
    import torch

    m, k = weights.shape
    if not isinstance(b, torch.Tensor) or b.dtype != torch.float16 or b.dim() != 2 or b.shape[0] != k or not b.numel():
        raise InputError(f"Activations are a float16 tensor ({k}, n); got {getattr(b, 'shape', type(b).__name__)}.")
    if len(weights.dense):
        raise InputError(f"{len(weights.dense)} tiles are kept dense; make the form with most_words=8192.")
    rows, columns = weights.padded
    device, n = b.device, b.shape[1]
    x = torch.zeros(columns, n, dtype=torch.float16, device=device)
    x[:k] = b
    offsets = torch.from_numpy(weights.offsets.astype(np.int64)).to(device)
    words = torch.from_numpy(weights.words.astype(np.int64)).to(device)
    strips, parts = rows // TILE[0], -(-n // _COLUMNS)
    out = torch.empty(n, rows, dtype=torch.float32, device=device)
    tile = torch.empty(strips * parts * TILE[0] * TILE[1], dtype=torch.float16, device=device)
    _words_kernel[(strips, parts)](
        offsets, words, x, out, tile, columns // TILE[1], n, rows, TILE[0], TILE[1], _COLUMNS, 128
    )
    return out.T[:m]
