"""System 60: MixPE, dequantisation after group products and shift-add multipliers (arXiv 2411.16158).

No figure of the paper but those of its abstract could be read. The gate ratios are reference mappings that build both
sides of a ratio in one way; so do we, and show the other ways beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bitwright.arithmetic.late_dequantisation import (
    GroupedWeights,
    dequantisation_work,
    group_products,
    quantise_weights,
)
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.late_dequantiser_waveforms import verify_gates
from bitwright.engine.libraries import find_library
from bitwright.engine.mixed_precision_units import (
    accumulating_apart,
    array_multiplier,
    booth_multiplier,
    half_by_uint4_truncating,
)
from bitwright.engine.rtl.late_dequantiser import Activations, MixedArray
from bitwright.engine.standalone_units import (
    Unit,
    float_multiplier,
    half_by_uint4,
    integer_multiplier,
    product,
    unit_gates,
)
from bitwright.reproduce import mixpe_models, mixpe_performance
from bitwright.reproduce.claims import Claim

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.arithmetic.late_dequantisation.matmul",
    "bitwright.arithmetic.late_dequantisation.dequantisation_work",
    "bitwright.kernels.late_dequantisation.matmul",
    "bitwright.engine.rtl.late_dequantiser.MixedArray",
    "bitwright.engine.late_dequantising_array.network_cost",
    "bitwright.models.late_dequantised_linear.late_dequantised",
)
_REFERENCE = "reference mappings with open tools, OSU018, independent of this package and not of the paper"
_EXACT = "follows from the algebra of arXiv 2411.16158"
_ABSTRACT = "arXiv 2411.16158, abstract"
LIBRARIES = ("osu018", "predictive-28nm")
_SAME_ROWS = "both sides gated rows without sign extension, best area x period of five scripts"
_TOOL = (
    "8 x 8 left to the tool, which extends the sign of all eight partial products: larger than any of the 8 x 8 built "
    "row by row, so the ratio flatters the 4-bit multiplier"
)
# name -> unit, and whether an accumulator of 32 bits stands behind it, apart or merged
UNITS: dict[str, tuple[Callable[[], Unit], str]] = {
    "4x8 shift-add": (lambda: array_multiplier(8, 4, False), ""),
    "8x8": (lambda: array_multiplier(8, 8), ""),
    "8x8 Booth": (lambda: booth_multiplier(8), ""),
    "4x8 of the tool": (lambda: product("int8*uint4"), ""),
    "8x8 of the tool": (lambda: integer_multiplier(8, 8), ""),
    "W4A8 MAC": (lambda: array_multiplier(8, 4, False), "apart"),
    "INT8 MAC": (lambda: array_multiplier(8, 8), "apart"),
    "merged W4A8 MAC": (lambda: array_multiplier(8, 4, False), "merged"),
    "merged INT8 MAC": (lambda: array_multiplier(8, 8), "merged"),
    "FP16 x UINT4, truncating": (half_by_uint4_truncating, ""),
    "FP16 x UINT4, exact, subnormal, infinite": (half_by_uint4, ""),
    "FP16 x FP16": (lambda: float_multiplier(5, 10), ""),
}
# ours over the peer: area, period, the relative tolerance the reference asks for or None where unlike is compared, why
GATES: dict[tuple[str, str], tuple[float, float, float | None, str]] = {
    ("4x8 shift-add", "8x8"): (0.46, 0.75, 0.15, _SAME_ROWS),
    ("4x8 shift-add", "8x8 Booth"): (0.46, 0.75, None, "the smallest 8 x 8 we know, half as many rows"),
    ("4x8 of the tool", "8x8 of the tool"): (0.46, 0.75, None, _TOOL),
    ("W4A8 MAC", "INT8 MAC"): (0.69, 0.83, 0.15, _SAME_ROWS + ", the accumulator's adder apart"),
    ("merged W4A8 MAC", "merged INT8 MAC"): (
        0.69, 0.83, None, "the accumulator merged into the rows, which spares both sides one carry chain",
    ),
    ("FP16 x UINT4, truncating", "FP16 x FP16"): (
        0.425, 0.73, 0.15, "both truncating, of normal numbers, to an FP16 word; the integer normalised first",
    ),
    ("FP16 x UINT4, exact, subnormal, infinite", "FP16 x FP16"): (
        0.425, 0.73, None,
        "ours is exact (21 bits) and takes subnormals, infinities and NaN, the FP16 multiplier does not",
    ),
}  # fmt: skip


def unit_figures(name: str, library: str) -> tuple[float, float]:
    """Area (um2) and clock period (s) of a unit between registers."""
    make, accumulator = UNITS[name]
    cells = find_library(library)
    if accumulator == "apart":
        whole = accumulating_apart(make(), cells)
        return whole.area_um2, whole.period_s
    report = unit_gates(make().accumulating() if accumulator else make(), cells)
    return report.area_um2, report.period_s or report.longest_path_s


def array_vectors(activations: Activations, groups: int = 192, group: int = 16) -> Quantity:
    """Cycles in which the mapped 4 x 4 array with its dequantisers equals the model, of all, random operands."""
    rng, k = np.random.default_rng(0), groups * group - 3
    weights = quantise_weights(rng.normal(0, 0.1, (k, 4)), group=group, half_scales=True)
    x: Any = rng.integers(-128, 128, (4, k)).astype(np.int8)
    if activations == "a16":
        x = (rng.normal(size=(4, k)) * np.exp2(rng.integers(-20, 9, (4, k)))).astype(np.float16)
    array = MixedArray(activations, 4, 4, group)
    found = verify_gates(array, x, weights, find_library("predictive-28nm"))
    source = f"{found.cycles} cycles, {16 * groups} results, {found.mismatches} wrong outputs"
    return Quantity(100.0 if found.passed else 0.0, "%", Evidence.SIMULATED, source)


def exact_groups() -> tuple[int, int]:
    """Products P, sums R and differences P - z R that equal integer arithmetic, and how many were tried."""
    rng = np.random.default_rng(0)
    right = tried = 0
    for group in (32, 64, 128, 200):
        for m in (1, 17):
            x = rng.integers(-128, 128, (m, 200)).astype(np.int8)
            weights = GroupedWeights(
                rng.integers(0, 16, (200, 9)).astype(np.uint8), np.ones((-(-200 // group), 9), np.float32),
                rng.integers(0, 16, (-(-200 // group), 9)).astype(np.uint8), 4, group,
            )  # fmt: skip
            products, sums = group_products(x, weights)
            for at, start in enumerate(range(0, 200, group)):
                part = x[:, start : start + group].astype(np.int64)
                centred = weights.codes[start : start + group].astype(np.int64) - weights.zero[at]
                right += bool(
                    (products[at] - weights.zero[at].astype(np.int64) * sums[at][:, None] == part @ centred).all()
                )
                tried += 1
    return right, tried


def _crossover(zero_points: bool) -> Quantity:
    """First m at which late dequantisation is not less work than dequantising each weight once, g = 128."""
    less = [m for m in range(1, 300)
            if (w := dequantisation_work(m, 1, 1280, 128, zero_points)).late < w.classical_reused]  # fmt: skip
    return Quantity(max(less) + 1, "rows", Evidence.PREDICTED, "first m at which late dequantisation is not less work")


def _gate_claims() -> list[Claim]:
    found = []
    for library in LIBRARIES:
        for (name, peer), (area, period, tolerance, why) in GATES.items():
            for at, (what, figure) in enumerate((("area", area), ("period", period))):

                def ours(name: str = name, peer: str = peer, at: int = at, library: str = library) -> Quantity:
                    one, two = (unit_figures(each, library)[at] for each in (name, peer))
                    return Quantity(one / two, "x", Evidence.SYNTHESISED, library)

                published = Quantity(figure, "x", Evidence.PUBLISHED, _REFERENCE)
                found.append(Claim(f"{name} over {peer}, {what}", library, published, ours,
                                   tolerance if library == "osu018" else None, why, "lower"))  # fmt: skip
    return found


def _performance_claims() -> list[Claim]:
    found = []
    for assumptions in mixpe_performance.sets():
        for what, figure, value in (("speed", "speed", 2.6), ("energy", "energy", 1.4)):
            published = Quantity(value, "x", Evidence.PUBLISHED, _ABSTRACT)
            measure = mixpe_performance.measured(assumptions, "speed" if figure == "speed" else "energy")
            found.append(Claim(f"{what} over other accelerators", assumptions.text, published, measure, 0.2,
                               "the abstract names neither baseline nor areas: one row per set of assumptions",
                               "higher"))  # fmt: skip
    return found


def claims() -> tuple[Claim, ...]:
    """Exactness, crossover, gates, networks, and the abstract's speed and energy under every set of assumptions."""

    def exact() -> Quantity:
        right, tried = exact_groups()
        return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right} of {tried}")

    def published(value: float, unit: str, source: str = _EXACT) -> Quantity:
        return Quantity(value, unit, Evidence.PUBLISHED, source)

    found = [
        Claim("group products equal to integers", "int8 x uint4 with zero points, m = 1 and 17, short last groups",
              published(100, "%"), exact, 0.0),
        Claim("crossover of dequantisation work", "g = 128, no zero points, dequantised weights kept",
              published(128, "rows"), lambda: _crossover(False), 0.0),
        Claim("crossover of dequantisation work", "g = 128, zero points, dequantised weights kept",
              published(64, "rows"), lambda: _crossover(True), 0.0),
        Claim("gates of the MixPE-A8 array equal to the model", "4 x 4, dequantisers, mapped netlist",
              published(100, "%"), lambda: array_vectors("a8"), 1e-12),
        Claim("gates of the MixPE-A16 array equal to the model", "4 x 4, dequantisers, mapped netlist",
              published(100, "%"), lambda: array_vectors("a16"), 1e-12),
        Claim("difference to dequantised weights", "float32 against float64, all linear layers of MiniLM; below 1e-5",
              published(1e-5, "", "tolerance of the reference"), mixpe_models.minilm_difference, 0.1, "", "lower"),
    ]  # fmt: skip
    lossless = Quantity(1.0, "x", Evidence.PUBLISHED, "no loss; the paper's tables are of larger networks")
    for weights, activations in (("asymmetric", "float"), ("asymmetric", "int8"), ("symmetric", "int8")):

        def ratio(weights: Any = weights, activations: Any = activations) -> Quantity:
            return mixpe_models.perplexity_ratio(weights, activations)

        bits = "W4A8" if activations == "int8" else "W4A32"
        conditions = f"SmolLM2-135M, {bits}, {weights}, g = 128, round to nearest"
        why = "round to nearest on a network of 135 million weights"
        found.append(Claim("perplexity over that of float32", conditions, lossless, ratio, None, why, "lower"))
    return (*found, *_gate_claims(), *_performance_claims())
