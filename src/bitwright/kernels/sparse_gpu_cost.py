"""Time of sparse and dense products with few columns on a GPU, and of decoding a large model with them.

Loading and expanding overlap in a pipeline that is never perfect: t = (t_memory^3 + t_expand^3)^(1/3), with t_memory =
stored bytes / bandwidth and t_expand = weights / (weights expanded per second) (1 + (n - 8) / 110), zeros included: a
tile is expanded whole. That term, not bytes, limits high sparsity. Evidence: predicted; the rates of `A100` were found
from one shape (36,864 x 9,216 by 8) of the released kernel's figure and are used for all others. Source: arXiv
2309.10285.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Literal

from bitwright.core.errors import InputError
from bitwright.kernels.sparse_matmul import TILE, bytes_per_weight

Form = Literal["tiled words", "bitmap", "dense"]
_PIPELINE = 3.0  # exponent of the overlap


@dataclass(frozen=True)
class SparseGpu:
    """Bytes per second that the sparse and the dense kernel sustain, weights expanded per second at 8 columns, columns
    by which its time doubles, memory in bytes, float16 operations per second of the matrix units, bytes per second of a
    GPU's links in one direction."""

    sparse_bytes_per_s: float = 1.55e12
    dense_bytes_per_s: float = 1.69e12
    expanded_per_s: float = 2.06e12
    columns_scale: float = 110.0
    memory_bytes: float = 80e9
    operations_per_s: float = 312e12
    link_bytes_per_s: float = 300e9


A100 = SparseGpu()


@dataclass(frozen=True)
class SparseCost:
    """Time, stored bytes, and what is slower: "memory", "expansion" or "compute"."""

    time_s: float
    bytes: float
    bound: str


def intensity(m: int, n: int, sparsity: float = 0.0, overhead: float = 2.0) -> float:
    """Operations per float16 element moved, M N / (M c + N): c = (1 - sparsity) * overhead with sparse weights, whose
    stored bytes per weight are `overhead` times 2; 1 for dense ones."""
    share = (1 - sparsity) * overhead if sparsity else 1.0
    return m * n / (m * share + n)


def lscd_cost(
    m: int, k: int, n: int, sparsity: float, machine: SparseGpu = A100, form: Form = "tiled words"
) -> SparseCost:
    """Predicted time of W (m, k) by (k, n), m and k in whole tiles of 128 x 64.

    A bitmap is taken to expand as fast as words. Raises InputError for sizes below one and shares outside of 0 to 1.
    """
    if min(m, k, n) < 1 or not 0 <= sparsity <= 1:
        raise InputError(f"{m} x {k} by {n} at sparsity {sparsity} asked for; expected sizes and a share.")
    tiles = ceil(m / TILE[0]) * ceil(k / TILE[1])
    weights = tiles * TILE[0] * TILE[1]
    compute = 2.0 * m * k * n / machine.operations_per_s
    if form == "dense":
        memory = 2.0 * m * k / machine.dense_bytes_per_s
        return SparseCost(max(memory, compute), 2.0 * m * k, "memory" if memory >= compute else "compute")
    stored = weights * bytes_per_weight(1 - sparsity)[form] + 4.0 * (tiles + 2)
    memory = stored / machine.sparse_bytes_per_s
    expand = weights / machine.expanded_per_s * (1 + (n - 8) / machine.columns_scale)
    overlapped = (memory**_PIPELINE + expand**_PIPELINE) ** (1 / _PIPELINE)
    bound = "compute" if compute > overlapped else "memory" if memory >= expand else "expansion"
    return SparseCost(max(overlapped, compute), stored, bound)


@dataclass(frozen=True)
class DecoderShape:
    """Layers, hidden size, tokens in the vocabulary; the feed-forward is 4 times as wide (OPT)."""

    layers: int
    hidden: int
    vocabulary: int = 50272

    @property
    def layer_weights(self) -> int:
        """Weights of the four products of a layer."""
        return 12 * self.hidden**2

    @property
    def weights(self) -> int:
        """Weights of all layers and the embedding."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden


OPT: Mapping[str, DecoderShape] = MappingProxyType(
    {"30b": DecoderShape(48, 7168), "66b": DecoderShape(64, 9216), "175b": DecoderShape(96, 12288)}
)


@dataclass(frozen=True)
class Decoding:
    """How tokens are made: prompt and made tokens of each sequence, seconds per layer for all that is not a product of
    weights nor reading keys and values (attention kernels, latencies of all-reduces,
    launches; `layer_overhead` finds it)."""

    prompt: int = 64
    made: int = 512
    layer_overhead_s: float = 0.0


def step_time(
    model: DecoderShape, gpus: int, batch: int, sparsity: float | None, how: Decoding, machine: SparseGpu = A100
) -> float:
    """Seconds of one decoding step at the middle of the generation, weights split over `gpus` (tensor parallel).

    `sparsity` None: dense. Raises InputError as `lscd_cost`."""
    h = model.hidden
    form: Form = "dense" if sparsity is None else "tiled words"
    shapes = ((3 * h // gpus, h), (h, h // gpus), (4 * h // gpus, h), (h, 4 * h // gpus))
    share = sparsity or 0.0
    products = sum(lscd_cost(m, k, batch, share, machine, form).time_s for m, k in shapes)
    context = how.prompt + how.made / 2
    keys_and_values = 4.0 * h * context * batch / gpus / machine.dense_bytes_per_s
    sums = 2 * 2 * (gpus - 1) / gpus * 2.0 * h * batch / machine.link_bytes_per_s  # two all-reduces in a ring
    head = lscd_cost(model.vocabulary // gpus, h, batch, 0.0, machine, "dense").time_s
    return model.layers * (products + keys_and_values + sums + how.layer_overhead_s) + head


def tokens_per_gpu_second(
    model: DecoderShape, gpus: int, batch: int, sparsity: float | None, how: Decoding, machine: SparseGpu = A100
) -> float:
    """Predicted tokens per second and GPU. Raises InputError as `lscd_cost`."""
    return batch / step_time(model, gpus, batch, sparsity, how, machine) / gpus


def layer_overhead(
    model: DecoderShape, gpus: int, batch: int, measured: float, machine: SparseGpu = A100, prompt: int = 64,
    made: int = 512,
) -> Decoding:  # fmt: skip
    """The decoding whose overhead per layer makes a dense model reach `measured` tokens per GPU-second.

    Raises InputError where the products alone take longer."""
    missing = batch / (measured * gpus) - step_time(model, gpus, batch, None, Decoding(prompt, made), machine)
    if missing < 0:
        raise InputError(f"{measured} tokens per GPU-second is more than the products of weights allow.")
    return Decoding(prompt, made, missing / model.layers)


def gpus_needed(
    model: DecoderShape, batch: int, sparsity: float | None, how: Decoding, machine: SparseGpu = A100
) -> int:
    """GPUs, a power of two, whose memories hold weights (float16, or 4 bytes per one kept), the embedding, and keys and
    values of the whole batch at full length. Raises InputError for a share outside of 0 to 1."""
    per_weight = 2.0 if sparsity is None else bytes_per_weight(1 - sparsity)["tiled words"]
    stored = model.layers * model.layer_weights * per_weight + 2.0 * model.vocabulary * model.hidden
    stored += 4.0 * model.hidden * model.layers * (how.prompt + how.made) * batch
    return 1 << (ceil(stored / machine.memory_bytes) - 1).bit_length()
