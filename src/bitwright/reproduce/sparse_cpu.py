"""System 68: int8 block-sparse inference for transformer encoders on CPUs (arXiv 2306.16601)."""

from __future__ import annotations

from functools import cache as memory
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from bitwright import _native
from bitwright.core.errors import BitwrightError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.block_sparse_cost import ICE_LAKE, vnni_cost
from bitwright.kernels.block_sparse_matmul import BlockCSR, Rounding, matmul, matmul_norm, slab_width, to_slabs
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.sparse_networks import digit_accuracies, minilm_figures, minilm_times

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.block_sparse_matmul.BlockCSR",
    "bitwright.kernels.block_sparse_matmul.matmul",
    "bitwright.kernels.block_sparse_matmul.attention",
    "bitwright.kernels.block_sparse_cost.vnni_cost",
    "bitwright.compression.block_pruning.BlockPruning",
    "bitwright.models.block_sparse_encoder.BlockSparseEncoder",
)
SPARSITIES = (0.7, 0.75, 0.8, 0.85, 0.9)
# Outputs, inputs, tokens -> dense-equivalent operations per second / 1e9 of one core at each of SPARSITIES
VALIDATED = {
    (1024, 1024, 64): (1007, 1207, 1523, 2017, 2954), (768, 3072, 64): (845, 1008, 1320, 1823, 2858),
    (256, 256, 16): (602, 675, 802, 968, 1274), (1024, 4096, 80): (600, 722, 931, 1316, 1994),
}  # fmt: skip
_TABLE = "released kernel's validated performance table, Xeon Platinum 8375C, one core"
_PAPER = "arXiv 2306.16601, abstract"
_CARDS = "model cards of the authors: less than 1 % of accuracy lost (DistilBERT, 80 %)"


def block_weights(outputs: int, inputs: int, sparsity: float, seed: int = 0) -> NDArray[np.int8]:
    """Random int8 weights with this share of their (4, 1) blocks 0."""
    rng = np.random.default_rng(seed)
    kept = np.repeat(rng.random((-(-outputs // 4), inputs)) >= sparsity, 4, axis=0)[:outputs]
    return (rng.integers(-128, 128, (outputs, inputs)) * kept).astype(np.int8)


def exact_products() -> tuple[int, int]:
    """Products of random shapes, sparsities and extremes that equal 64-bit integer arithmetic, and how many."""
    rng, right, tried = np.random.default_rng(1), 0, 0
    for sparsity in (0.0, 0.3, 0.7, 0.9, 1.0):
        for _ in range(8):
            outputs, inputs, tokens = (int(rng.integers(1, most)) for most in (90, 600, 401))
            for w, a in (
                (block_weights(outputs, inputs, sparsity, tried), rng.integers(0, 256, (inputs, tokens))),
                (np.full((outputs, inputs), -128, np.int8), np.full((inputs, tokens), 255)),
            ):
                found = matmul(BlockCSR.from_dense(w), a.astype(np.uint8))
                right += bool((found == w.astype(np.int64) @ a).all())
                tried += 1
    return right, tried


def most_steps() -> float:
    """Largest difference in int8 steps between codes after scale, bias, zero point, residual and GELU, and those of
    float64."""
    import torch

    rng = np.random.default_rng(2)
    w, a = block_weights(200, 300, 0.8), rng.integers(0, 256, (300, 150)).astype(np.uint8)
    add, bias = rng.normal(size=(200, 150)).astype(np.float32), rng.normal(size=200).astype(np.float32)
    exact = (w.astype(np.int64) @ (a.astype(np.int64) - 100)) * np.float64(np.float32(2e-4)) + bias[:, None] + add
    most = 0.0
    for gelu in (False, True):
        y = torch.nn.functional.gelu(torch.from_numpy(exact)).numpy() if gelu else exact
        for rounding in (Rounding(0.05, 90), Rounding(0.04, 0, signed=True)):
            found = matmul(
                BlockCSR.from_dense(w), a, scale=2e-4, bias=bias, zero_point=100, add=add, gelu=gelu, rounding=rounding
            )
            most = max(most, float(np.abs(found.astype(int) - rounding.codes(y)).max()))
    return most


def norm_difference() -> float:
    """Largest difference between the norm in the product's passes and the norm of the finished product."""
    import torch

    rng = np.random.default_rng(3)
    w, a = BlockCSR.from_dense(block_weights(384, 300, 0.8)), rng.integers(0, 256, (300, 150)).astype(np.uint8)
    two = torch.from_numpy(matmul(w, a, scale=1e-4).T.astype(np.float64))
    fused, _ = matmul_norm(w, a, scale=1e-4, gain=1.0, offset=0.0, epsilon=1e-6)
    return float(np.abs(fused - torch.nn.functional.layer_norm(two, (384,), eps=1e-6).T.numpy()).max())


@memory
def speed_over_dense(outputs: int, inputs: int, tokens: int, sparsity: float, threads: int = 1) -> float:
    """Median time of torch's int8 product of the dense weights over that of ours, interleaved.

    Raises BitwrightError on a CPU without VNNI."""
    import torch

    if _native.block_sparse_path() != "vnni":
        raise BitwrightError("This CPU has no AVX-512 VNNI, for which the speed is claimed.")
    rng = np.random.default_rng(4)
    w, a = BlockCSR.from_dense(block_weights(outputs, inputs, sparsity)), rng.integers(0, 128, (inputs, tokens))
    codes, out = a.astype(np.uint8), np.empty((outputs, tokens), np.int32)
    x, dense = torch.from_numpy(a.T.astype(np.int8)), torch.from_numpy(block_weights(outputs, inputs, 0.0)).t()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ours: list[float] = []
    theirs: list[float] = []
    try:
        for _ in range(31):
            for times, side in (
                (ours, lambda: matmul(w, codes, threads=threads, out=out)),
                (theirs, lambda: torch._int_mm(x, dense)),
            ):
                start = perf_counter()
                side()
                times.append(perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return float(median(theirs) / median(ours))


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def _counted() -> Quantity:
    right, tried = exact_products()
    return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right} of {tried}, {_native.block_sparse_path()}")


def _ice_lake(shape: tuple[int, int, int], sparsity: float) -> Quantity:
    found = vnni_cost(*shape, sparsity, ICE_LAKE, "published")
    return Quantity(found.dense_operations_per_s / 1e9, "Gop/s", Evidence.PREDICTED, f"limited by {found.bound}")


def _bytes() -> Quantity:
    w = BlockCSR.from_dense(block_weights(1024, 1024, 0.8))
    return Quantity(w.nbytes / (4 * w.blocks), "B", Evidence.EXECUTED, "16-bit indices; filling and row starts counted")


def _speed() -> Quantity:
    ratios = {sparsity: speed_over_dense(1024, 1024, 64, sparsity) for sparsity in (0.7, 0.8, 0.9)}
    text = ", ".join(f"{100 * sparsity:.0f} %: x{ratio:.2f}" for sparsity, ratio in ratios.items())
    return Quantity(ratios[0.9], "x", Evidence.EXECUTED, f"torch int8, one thread; {text}")


@memory
def remainder_efficiency() -> float:
    """Speed per column at 80 tokens over that at 64, 1,024 x 1,024, 80 %, rows of whole cache lines, one thread."""
    w, rng = BlockCSR.from_dense(block_weights(1024, 1024, 0.8)), np.random.default_rng(5)
    sides = {n: to_slabs(rng.integers(0, 256, (1024, n)).astype(np.uint8), slab_width(n)) for n in (64, 80)}
    found: dict[int, list[float]] = {n: [] for n in sides}
    for _ in range(101):
        for n, a in sides.items():
            start = perf_counter()
            matmul(w, a, tokens=n, threads=1)
            found[n].append((perf_counter() - start) / n)
    return float(median(found[64]) / median(found[80]))


def _remainder() -> Quantity:
    return Quantity(remainder_efficiency(), "x", Evidence.EXECUTED, "one tile of 80 columns; goal 0.85")


def _lost(block: str) -> Quantity:
    found = digit_accuracies()
    text = f"{100 * found[block]:.1f} % against {100 * found['longer']:.1f} % dense, trained as long"
    return Quantity(100 * (found["longer"] - found[block]), "points", Evidence.EXECUTED, text)


def _minilm(name: str) -> Quantity:
    found = minilm_figures()
    text = f"own passage first {100 * found[name + ' recall']:.1f} %, original {100 * found['recall']:.1f} %"
    return Quantity(100 * found[name + " agreement"], "%", Evidence.EXECUTED, text)


def _end_to_end(over: str) -> Quantity:
    times = minilm_times()
    factors = [
        ("padding", times["float32"] / times["float32, no padding"]),
        ("int8, fused", times["float32, no padding"] / times["int8"]),
        ("sparsity", times["int8"] / times["int8, pruned"]),
    ]
    text = ", ".join(f"{name} x{value:.2f}" for name, value in factors)
    return Quantity(times[over] / times["int8, pruned"], "x", Evidence.EXECUTED, text)


def claims() -> tuple[Claim, ...]:
    """Exactness, sizes, the validated table predicted, speed on this machine, accuracy. Whole tables of speed are in
    `benchmarks/block_sparse_matmul.py`."""
    follows = "follows from integer arithmetic"
    found = [
        Claim("products equal to integer arithmetic", "random shapes, sparsity 0 to 100 %, -128 by 255",
              _published(100, "%", follows), _counted, 0.0),
        Claim("codes after scale, bias, zero point, residual, GELU", "largest difference to float64, in steps",
              _published(1, "steps", "rounding at a tie"),
              lambda: Quantity(most_steps(), "steps", Evidence.EXECUTED), 0.0, better="lower"),
        Claim("layer norm inside the product", "largest difference to a norm of its own in float64",
              _published(1e-6, "", "two passes"), lambda: Quantity(norm_difference(), "", Evidence.EXECUTED), 1.0,
              "float32 results of size 1 to 3: some 4 units in the last place", better="lower"),
        Claim("bytes per stored weight", "80 % of blocks dropped, 1,024 x 1,024",
              _published(2.0, "B", "32-bit index per 4 weights"), _bytes, 0.05,
              "16-bit indices halve what an index takes", better="lower"),
    ]  # fmt: skip
    for shape, figures in VALIDATED.items():
        whole = shape[2] == 64
        for sparsity, figure in zip(SPARSITIES, figures, strict=True):
            found.append(
                Claim("dense-equivalent speed of the published kernel",
                      f"{shape[0]}x{shape[1]}x{shape[2]}, {100 * sparsity:.0f} %", _published(figure, "Gop/s", _TABLE),
                      partial(_ice_lake, shape, sparsity), 0.2 if whole else None,
                      "straight-line code for one tile of columns is limited by the decoders; activations of 3,072 "
                      "inputs lie in L2, whose latency is not modelled" if whole else
                      "16 and 80 columns: call overhead and code of the remainder tile are not modelled")
            )  # fmt: skip
    found.append(
        Claim("speed over dense int8", "1,024 x 1,024 x 64, 90 %, this machine",
              _published(5.0, "x", _PAPER + ": up to, over oneDNN"), _speed, 0.1, better="higher")
    )  # fmt: skip
    found += [
        Claim("speed per column at N = 80 over that at N = 64", "1,024 x 1,024, 80 %, this machine",
              _published(931 / 1523, "x", _TABLE + " (other K)"), _remainder, 0.1,
              "one tile of 80 columns instead of 64 and 16", better="higher"),
        Claim("accuracy lost, (4, 1) blocks", "digits, 90 %, gradual", _published(1.0, "points", "DistilBERT, 80 %"),
              partial(_lost, "4x1"), None, "another network and task; single weights and (4, 4) follow"),
        Claim("accuracy lost, single weights", "digits, 90 %, gradual", _published(1.0, "points", "DistilBERT, 80 %"),
              partial(_lost, "1x1"), None, "another network and task"),
        Claim("accuracy lost, (4, 4) blocks", "digits, 90 %, gradual", _published(1.0, "points", "DistilBERT, 80 %"),
              partial(_lost, "4x4"), None, "another network and task"),
        Claim("same passage first as the original", "MiniLM, int8, not pruned", _published(99.0, "%", _CARDS),
              partial(_minilm, "dense int8"), 0.02, better="higher"),
        Claim("same passage first as the original", "MiniLM, 80 % of (4, 1) blocks, int8",
              _published(99.0, "%", _CARDS), partial(_minilm, "int8"), None,
              "a few minutes of learning from the original on one book; the published models trained for days"),
        Claim("encoder over torch float32", "MiniLM 80 %, 8 sentences, one thread",
              _published(24.2, "x", "DistilBERT 80 %, model card"), partial(_end_to_end, "float32"), None,
              "the published figure is on 24 cores with AMX-less int8; ours splits into padding, int8 and sparsity"),
    ]  # fmt: skip
    return tuple(found)
