"""Time of attention on a GPU from its tiles: loop order and work split of FlashAttention 1 and 2, and plain attention.

A block of a grid is a tile of queries (version 2; of keys in its backward pass), or a whole head (version 1). Counted
are operations of the matrix unit, other fp32 operations, bytes of shared memory that the warps of a block read for
their parts of each product, and bytes of main memory. A multiprocessor does matrix and other operations one after the
other and overlaps them with shared memory; blocks run in waves. Evidence: predicted, from data-sheet rates alone.

Source: arXiv 2307.08691, sections 2.3 and 3; tile sizes of the released A100 kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Literal, get_args

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import load_machine

Algorithm = Literal["plain", "version 1", "version 2"]
HALF = 2  # bytes
# Other operations for one score: scaling and subtraction (fused), maximum, exponential (a quarter of the rate), sum and
# conversion; in the backward pass also the gradient's difference and product.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 8, 10
# Rows and columns of a tile and warps of a block, by channels: forward, backward.
TILES: Mapping[int, tuple[tuple[int, int, int], tuple[int, int, int]]] = MappingProxyType({
    64: ((128, 128, 4), (128, 128, 8)),
    128: ((128, 64, 4), (64, 128, 8)),
})  # fmt: skip
SHARED_BYTES_PER_CLOCK = 128  # of a multiprocessor: 32 banks of 4 bytes (CUDA programming guide)


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors, operations per second of all (matrix unit in half precision, fp32), clock, memory bandwidth."""

    multiprocessors: int
    matrix_per_s: float
    other_per_s: float
    clock_hz: float
    bytes_per_s: float

    @property
    def shared_bytes_per_s(self) -> float:
        """Of all multiprocessors."""
        return SHARED_BYTES_PER_CLOCK * self.clock_hz * self.multiprocessors


def gpu(name: str) -> Gpu:
    """A GPU of the machine presets. Raises UnknownNameError, and InputError where a figure is missing."""
    device = load_machine(name).device()
    memory = device.main_memory.bandwidth
    if device.cores is None or device.clock is None or memory is None:
        raise InputError(f"{name} states no number of cores, clock or bandwidth; add them to the machine file.")
    return Gpu(
        int(device.cores.value), device.compute.matrix["fp16"].value, device.compute.vector["fp32"].value,
        device.clock.value, memory.value,
    )  # fmt: skip


@dataclass(frozen=True)
class AttentionShape:
    """Half-precision attention of a batch: tokens of queries and keys alike, heads, channels of a head."""

    batch: int
    tokens: int
    heads: int
    channels: int
    causal: bool = False

    @property
    def forward_flops(self) -> float:
        """4 n^2 d per head, half of it with a causal mask, as papers count them."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.channels * (0.5 if self.causal else 1.0)


def _visited(shape: AttentionShape, rows: int, columns: int) -> float:
    """Tiles that are computed: with a causal mask those with at least one score below the diagonal."""
    down, across = ceil(shape.tokens / rows), ceil(shape.tokens / columns)
    if not shape.causal:
        return float(down * across)
    return float(sum(min(across, ceil((i + 1) * rows / columns)) for i in range(down)))


def _product_bytes(m: int, n: int, k: int, down: int, across: int) -> float:
    """Shared memory that the warps of a block read for a product (m, k) by (k, n), half precision: `down` warps share
    out the rows and `across` warps the columns, each reads its rows of the first operand and columns of the second."""
    return HALF * (across * m * k + down * k * n)


def _grid_time(device: Gpu, blocks: int, matrix: float, other: float, shared: float, memory: float) -> float:
    """Seconds of so many equal blocks: the totals over all blocks, in waves over the multiprocessors."""
    waves = ceil(blocks / device.multiprocessors) * device.multiprocessors / blocks
    on_chip = max(matrix / device.matrix_per_s + other / device.other_per_s, shared / device.shared_bytes_per_s)
    return max(waves * on_chip, memory / device.bytes_per_s)


def forward_time(shape: AttentionShape, device: Gpu, algorithm: Algorithm = "version 2") -> float:
    """Seconds of the forward pass. Raises UnknownNameError for other algorithms, InputError for other channels."""
    _check(shape, algorithm)
    heads, d, n = shape.batch * shape.heads, shape.channels, shape.tokens
    if algorithm == "plain":
        return _plain_time(shape, device, 2, 8)  # scores, mask or scale, softmax, each written and read
    rows, columns, warps = TILES[d][0]
    second = algorithm == "version 2"
    tiles = heads * _visited(shape, rows, columns)
    scores = tiles * rows * columns
    rescaled = tiles * rows * d * (1 if second else 2)  # version 1 divides as well as multiplies in every tile
    down, across = (warps, 1) if second else (1, warps)  # version 2 shares out queries, version 1 keys
    shared = tiles * 2 * _product_bytes(rows, columns, d, down, across)
    if not second:
        shared += tiles * 2 * 4 * warps * rows * d  # the warps' partial outputs are written and read in fp32
    blocks = heads * ceil(n / rows) if second else heads
    memory = heads * HALF * (2 * n * d + 2 * n * d * (1 if second else ceil(n / rows) / 8))
    return _grid_time(device, blocks, 4 * scores * d, FORWARD_OPERATIONS * scores + rescaled, shared, memory)


def backward_time(shape: AttentionShape, device: Gpu, algorithm: Algorithm = "version 2") -> float:
    """Seconds of the backward pass: five products to two. Raises as `forward_time`."""
    _check(shape, algorithm)
    heads, d, n = shape.batch * shape.heads, shape.channels, shape.tokens
    if algorithm == "plain":
        return _plain_time(shape, device, 4, 10)
    rows, columns, warps = TILES[d][1]
    second = algorithm == "version 2"
    tiles = heads * _visited(shape, rows, columns)
    scores = tiles * rows * columns
    shared = tiles * 5 * _product_bytes(rows, columns, d, warps // 2, 2)
    shared += tiles * 2 * HALF * 2 * rows * columns  # weights and their gradients go through shared memory
    blocks = heads * ceil(n / columns) if second else heads
    # gradients of the queries are read and written in fp32 for every tile, mostly in the second-level cache
    memory = heads * HALF * 8 * n * d
    return _grid_time(device, blocks, 10 * scores * d, BACKWARD_OPERATIONS * scores, shared, memory)


def _plain_time(shape: AttentionShape, device: Gpu, products: int, touches: int) -> float:
    """Products at the matrix unit's peak, then every touch of the scores through main memory."""
    heads, n = shape.batch * shape.heads, shape.tokens
    matrix = 2.0 * products * heads * n * n * shape.channels / device.matrix_per_s
    return matrix + touches * HALF * heads * n * n / device.bytes_per_s


def _check(shape: AttentionShape, algorithm: str) -> None:
    if algorithm not in get_args(Algorithm):
        raise UnknownNameError("algorithm", algorithm, get_args(Algorithm))
    if shape.channels not in TILES or min(shape.batch, shape.tokens, shape.heads) < 1:
        raise InputError(f"Tiles are known for {', '.join(map(str, TILES))} channels, not for {shape}.")


def rate(shape: AttentionShape, device: Gpu, algorithm: Algorithm = "version 2") -> float:
    """Operations per second of forward and backward pass together, counted as papers do (3.5 times the forward)."""
    time = forward_time(shape, device, algorithm) + backward_time(shape, device, algorithm)
    return 3.5 * shape.forward_flops / time
