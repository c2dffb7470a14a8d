"""System 12: unstructured sparsity loaded as sparse and computed as dense (arXiv 2309.10285)."""

from __future__ import annotations

from functools import cache as memory
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.sparse_gpu_cost import (
    OPT,
    Decoding,
    gpus_needed,
    intensity,
    layer_overhead,
    lscd_cost,
    tokens_per_gpu_second,
)
from bitwright.kernels.sparse_matmul import REGISTER_BUDGET, BitmapTiles, BlockedCSR, TiledCSL, matmul
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.sparse_networks import digit_accuracies, language_perplexities

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.sparse_matmul.TiledCSL",
    "bitwright.kernels.sparse_matmul.BitmapTiles",
    "bitwright.kernels.sparse_matmul.matmul",
    "bitwright.kernels.sparse_gpu_cost.lscd_cost",
    "bitwright.compression.unstructured_pruning.prune_unstructured",
    "bitwright.kernels.sparse_gpu_cost.tokens_per_gpu_second",
)
# (m, k) of the released benchmark: the four products of OPT-30B, -66B and -175B
SHAPES = (
    (21504, 7168), (7168, 7168), (28672, 7168), (7168, 28672), (27648, 9216), (9216, 9216), (36864, 9216),
    (9216, 36864), (36864, 12288), (12288, 12288), (49152, 12288), (12288, 49152),
)  # fmt: skip
COLUMNS = (8, 16, 32, 64)
_PAPER, _FIGURE = "arXiv 2309.10285, abstract", "released code's figure, A100, read from it"
_README = "released code's README, A100"
# model, GPUs, sparsity -> tokens per GPU-second at batch 8, 16, 32, 64
DECODING: dict[tuple[str, int, float | None], tuple[int, ...]] = {
    ("66b", 2, 0.8): (111, 198, 341, 521), ("66b", 4, None): (66, 123, 216, 360), ("175b", 4, 0.8): (46, 81, 136, 195),
    ("175b", 8, None): (23, 43, 79, 127),
}  # fmt: skip


def pruned(m: int, k: int, sparsity: float, seed: int = 0) -> NDArray[np.float16]:
    """Random float16 weights with this share of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(m, k)).astype(np.float16)
    w[rng.random((m, k)) < sparsity] = 0
    return w


def exact_forms() -> tuple[int, int]:
    """Matrices that come back bit by bit from every form, and how many were tried."""
    right = tried = 0
    for seed, sparsity in enumerate((0.5, 0.7, 0.9, 0.99, 1.0)):
        w = pruned(300, 500, sparsity, seed)
        w[1, :2] = np.array([0x7E01, 0x8000], np.uint16).view(np.float16)
        for form in (TiledCSL, BitmapTiles, BlockedCSR):
            right += bool((form.from_dense(w).to_dense().view(np.uint16) == w.view(np.uint16)).all())
            tried += 1
    return right, tried


def largest_error() -> float:
    """Largest difference to float64 products of the same numbers, over the sum of their magnitudes, over all forms."""
    rng, most = np.random.default_rng(1), 0.0
    for n in (1, 8, 16, 24, 64, 130):
        w, b = pruned(256, 512, 0.8, n), rng.normal(size=(512, n)).astype(np.float16)
        exact = w.astype(np.float64) @ b.astype(np.float64)
        for form in (TiledCSL, BitmapTiles, BlockedCSR):
            sizes = np.abs(w).astype(np.float64) @ np.abs(b).astype(np.float64)
            most = max(most, float((np.abs(matmul(form.from_dense(w), b) - exact) / sizes).max()))
    return most


@memory
def wavefronts(sparsity: float, reorder: bool) -> float:
    """Wavefronts per store of 32 lanes over 128 random tiles."""
    return TiledCSL.from_dense(pruned(1024, 1024, sparsity), reorder=reorder).conflicts()


def mean_speed(sparsity: float) -> float:
    """Predicted speed over the dense kernel, mean over all shapes and columns."""
    ratios = [
        lscd_cost(m, k, n, 0.0, form="dense").time_s / lscd_cost(m, k, n, sparsity).time_s
        for m, k in SHAPES
        for n in COLUMNS
    ]
    return float(np.mean(ratios))


@memory
def decoding() -> Decoding:
    """Prompt 64, 512 tokens made; overhead per layer from the dense OPT-66B at batch 8 and used for all others."""
    return layer_overhead(OPT["66b"], 4, 8, DECODING["66b", 4, None][0])


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def _predicted(value: float, unit: str, text: str = "") -> Quantity:
    return Quantity(value, unit, Evidence.PREDICTED, text)


def _share(counted: tuple[int, int]) -> Quantity:
    return Quantity(100 * counted[0] / counted[1], "%", Evidence.EXECUTED, f"{counted[0]} of {counted[1]}")


def _operations(n: int, sparsity: float) -> Quantity:
    cost = lscd_cost(36864, 9216, n, sparsity, form="tiled words" if sparsity else "dense")
    return _predicted(2e-12 * 36864 * 9216 * n / cost.time_s, "Tflop/s", f"limited by {cost.bound}")


def _bytes(sparsity: float) -> Quantity:
    w = pruned(2048, 2048, sparsity)
    form = TiledCSL.from_dense(w)
    text = f"bitmap {BitmapTiles.from_dense(w).nbytes / (2 * w.size):.3f}, 2:4 0.563"
    return Quantity(form.nbytes / (2 * w.size), "x", Evidence.EXECUTED, text)


def _full_tiles() -> Quantity:
    right = 0
    for density in (0.45, 0.55, 0.7, 0.85, 1.0):
        w = pruned(256, 256, 0.8)
        w[128:, 64:128] = pruned(128, 64, 1 - density, 3)
        form = TiledCSL.from_dense(w)
        words = -(-np.count_nonzero(w[128:, 64:128]) // 4) * 4
        caught = bool((form.slot >= 0).any()) == (words > REGISTER_BUDGET)
        right += caught and bool((form.to_dense() == w).all())
    return _share((right, 5))


def _tokens(model: str, gpus: int, sparsity: float | None, batch: int) -> Quantity:
    value = tokens_per_gpu_second(OPT[model], gpus, batch, sparsity, decoding())
    return _predicted(value, "tokens/s", f"overhead {1e6 * decoding().layer_overhead_s:.0f} us per layer")


def _gpus(model: str, sparsity: float | None) -> Quantity:
    return _predicted(
        gpus_needed(OPT[model], 64, sparsity, decoding()), "GPUs", "weights, keys and values at full length"
    )


def _waves(sparsity: float, reorder: bool) -> Quantity:
    return Quantity(wavefronts(sparsity, reorder), "", Evidence.SIMULATED)


def _mean_speed(sparsity: float) -> Quantity:
    return _predicted(mean_speed(sparsity), "x")


def _perplexity(name: str) -> Quantity:
    found = language_perplexities()
    text = f"perplexity {found[name]:.4g} and {found['whole']:.4g}"
    return Quantity(found[name] / found["whole"], "x", Evidence.EXECUTED, text)


def _digits_lost() -> Quantity:
    found = digit_accuracies()
    return Quantity(100 * (found["longer"] - found["1x1"]), "points", Evidence.EXECUTED, "450 held-out digits")


def _times(sparse: tuple[str, int, float | None], dense: tuple[str, int, float | None]) -> Quantity:
    ratios = [
        tokens_per_gpu_second(OPT[sparse[0]], sparse[1], batch, sparse[2], decoding())
        / tokens_per_gpu_second(OPT[dense[0]], dense[1], batch, dense[2], decoding())
        for batch in (8, 16, 32, 64)
    ]
    return _predicted(max(ratios), "x", ", ".join(f"{each:.2f}" for each in ratios) + " at batch 8 to 64")


def claims() -> tuple[Claim, ...]:
    """The form, its order, products, kernel ratios and end-to-end decoding. CPU speed is in
    `benchmarks/sparse_matmul.py`."""
    found = [
        Claim("matrices that come back bit by bit", "three forms, 50 to 100 % zeros, NaN and -0 among them",
              _published(100, "%", "follows from the form"), lambda: _share(exact_forms()), 0.0),
        Claim("error of products", "largest over the sum of magnitudes, N from 1 to 130, all forms",
              _published(2.0**-11, "", "half a unit of a float16 result"),
              lambda: Quantity(largest_error(), "", Evidence.EXECUTED), 0.0, "sums are float32", better="lower"),
        Claim("tiles beyond the registers found and kept right", "45 to 100 % density of one tile",
              _published(100, "%", "overflow silently in the released kernel"), _full_tiles, 0.0),
        Claim("operations per element moved", "M = 36,864, N = 8, 80 %", _published(20, "", "released article"),
              lambda: _predicted(intensity(36864, 8, 0.8), ""), 0.02),
    ]  # fmt: skip
    for sparsity, share in ((0.7, 0.6), (0.8, 0.4), (0.9, 0.2)):
        found.append(
            Claim("bytes over dense float16", f"{100 * sparsity:.0f} %", _published(share, "x", "32 bits per weight"),
                  partial(_bytes, sparsity), 0.02)
        )  # fmt: skip
    for sparsity, greedy, plain in ((0.5, 1.25, 2.95), (0.7, 1.35, 3.2), (0.8, 1.46, 3.5), (0.9, 1.64, 3.75)):
        for reorder, value in ((True, greedy), (False, plain)):
            where = Quantity(value, "", Evidence.SIMULATED, "an earlier simulator of 32 banks; the paper has no figure")
            found.append(
                Claim("wavefronts per store of a warp",
                      f"{100 * sparsity:.0f} %, {'banks spread' if reorder else 'row by row'}",
                      where,
                      partial(_waves, sparsity, reorder), 0.1,
                      "lanes that write to one 32-bit word do not conflict; stores of a part of a warp count too")
            )  # fmt: skip
    for n, figures in ((8, (13.5, 20, 25, 31)), (32, (53, 76, 89, 106))):
        for sparsity, figure in zip((0.0, 0.7, 0.8, 0.9), figures, strict=True):
            found.append(
                Claim("speed of one product", f"36,864 x 9,216 by {n}, {100 * sparsity:.0f} %",
                      _published(figure, "Tflop/s", _FIGURE), partial(_operations, n, sparsity),
                      0.06 if n == 8 else 0.15)
            )  # fmt: skip
    for sparsity, value in ((0.7, 1.4), (0.8, 1.7), (0.9, 2.1)):
        found.append(
            Claim("over dense products", f"mean of 12 shapes and N = 8 to 64, {100 * sparsity:.0f} %",
                  _published(value, "x", _README), partial(_mean_speed, sparsity), 0.15)
        )  # fmt: skip
    for (model, gpus, sparsity_of), tokens in DECODING.items():
        for batch, figure in zip((8, 16, 32, 64), tokens, strict=True):
            kind = "dense" if sparsity_of is None else f"{100 * sparsity_of:.0f} % zeros"
            found.append(
                Claim("tokens per GPU-second", f"OPT-{model}, {gpus} A100, {kind}, batch {batch}",
                      _published(figure, "tokens/s", _FIGURE), partial(_tokens, model, gpus, sparsity_of, batch), 0.2,
                      "attention kernels that slow down with the batch are part of one constant overhead")
            )  # fmt: skip
        found.append(
            Claim("GPUs needed", f"OPT-{model}, {kind}, batch 64, 80 GB each", _published(gpus, "GPUs", _FIGURE),
                  partial(_gpus, model, sparsity_of), 0.0)
        )  # fmt: skip
    for score in ("magnitude", "weight times input"):
        for percent in (50, 70, 80):
            found.append(
                Claim("perplexity over that of the whole network",
                      f"SmolLM2-135M, {percent} % by {score}, no training after it",
                      _published(1.0, "x", _PAPER + ": small loss at 80 % after training"),
                      partial(_perplexity, f"{score} {percent} %"), None,
                      "30 billion weights and training lose little at 80 %; 135 million without it do not keep it")
            )  # fmt: skip
    found += [
        Claim("accuracy lost, single weights 90 %", "encoder on digits, trained while it is pruned",
              _published(1.44, "points", "OPT-30B at 80 %, authors' article"), _digits_lost, None,
              "another network and task"),
        Claim("tokens per GPU-second over FasterTransformer", "best of OPT-66B, batch 8 to 64",
              _published(3.6, "x", _PAPER + ": best over models and batches"),
              partial(_times, ("66b", 2, 0.8), ("66b", 4, None)), None,
              "the published best is of another setting; the figure's own points are above"),
        Claim("over Sputnik and SparTA", "kernels, 70 to 90 %", _published(2.9, "x", _PAPER),
              lambda: _predicted(mean_speed(0.8), "x", "over dense products; neither peer is modelled"), None,
              "peers run on GPUs only"),
    ]  # fmt: skip
    return tuple(found)
