"""System 60: MixPE, dequantisation after group products and shift-add multipliers (arXiv 2411.16158)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bitwright.arithmetic.late_dequantisation import (
    GroupedWeights,
    dequantisation_work,
    group_products,
    matmul,
    quantise_tokens,
    quantise_weights,
)
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.libraries import find_library
from bitwright.engine.standalone_units import (
    Unit,
    float_multiplier,
    half_by_uint4,
    integer_multiplier,
    product,
    unit_gates,
)
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.arithmetic.late_dequantisation.matmul",
    "bitwright.arithmetic.late_dequantisation.dequantisation_work",
    "bitwright.engine.standalone_units.half_by_uint4",
)
_REFERENCE = "reference mappings with open tools, OSU018, independent of this package and not of the paper"
_EXACT = "follows from the algebra of arXiv 2411.16158"
LIBRARIES = ("osu018", "predictive-28nm")
UNITS: dict[str, Callable[[], Unit]] = {
    "4x8 shift-add": lambda: product("int8*uint4"),
    "8x8": lambda: integer_multiplier(8, 8),
    "W4A8 MAC": lambda: product("int8*uint4").accumulating(),
    "INT8 MAC": lambda: integer_multiplier(8, 8).accumulating(),
    "FP16 x UINT4": half_by_uint4,
    "FP16 x FP16": lambda: float_multiplier(5, 10),
}
# ours over the peer: area, period, and the relative tolerance the reference asks for
GATES = {
    ("4x8 shift-add", "8x8"): (0.46, 0.75, 0.15),
    ("W4A8 MAC", "INT8 MAC"): (0.69, 0.83, 0.15),
    ("FP16 x UINT4", "FP16 x FP16"): (0.425, 0.73, 0.15),
}


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


def _minilm_difference() -> Quantity:
    """Largest relative difference to float64 products of dequantised weights, over linear layers of MiniLM."""
    from torch import nn

    from bitwright.models.load import load

    layers = [m.weight.detach().numpy().T for m in load("minilm").encoder.modules() if isinstance(m, nn.Linear)]
    rng, worst = np.random.default_rng(0), 0.0
    for w in layers[:6]:
        weights = quantise_weights(w, group=128)
        codes, scale = quantise_tokens(rng.normal(size=(8, w.shape[0])))
        expected = (codes * scale.astype(np.float64)[:, None]) @ weights.dequantise()
        worst = max(worst, float(np.abs(matmul(codes, weights, scale) - expected).max() / np.abs(expected).max()))
    return Quantity(worst, "", Evidence.EXECUTED, "six layers of MiniLM, W4 g = 128, one scale per token")


def claims() -> tuple[Claim, ...]:
    """Exactness, crossover and gates. The speed and energy of whole accelerators are not predicted yet."""

    def exact() -> Quantity:
        right, tried = exact_groups()
        return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right} of {tried}")

    def crossover() -> Quantity:
        less = [
            m for m in range(1, 300) if (w := dequantisation_work(m, 1, 1280, 128, False)).late < w.classical_reused
        ]
        return Quantity(
            max(less) + 1, "rows", Evidence.PREDICTED, "first m at which late dequantisation is not less work"
        )

    found = [
        Claim("group products equal to integers", "int8 x uint4 with zero points, m = 1 and 17, short last groups",
              Quantity(100, "%", Evidence.PUBLISHED, _EXACT), exact, 0.0),
        Claim("crossover of dequantisation work", "g = 128, no zero points, dequantised weights kept",
              Quantity(128, "rows", Evidence.PUBLISHED, _EXACT), crossover, 0.0),
        Claim("difference to dequantised weights", "float32 against float64; published: below 1e-5",
              Quantity(1e-5, "", Evidence.PUBLISHED, "tolerance of the reference"), _minilm_difference, None),
    ]  # fmt: skip
    for library in LIBRARIES:
        for (name, peer), (area, period, tolerance) in GATES.items():
            for what, figure in (("area", area), ("period", period)):

                def ours(name: str = name, peer: str = peer, what: str = what, library: str = library) -> Quantity:
                    one, two = (unit_gates(UNITS[each](), find_library(library)) for each in (name, peer))
                    if what == "area":
                        ratio = one.area_um2 / two.area_um2
                    else:
                        ratio = (one.period_s or 0.0) / (two.period_s or 1.0)
                    return Quantity(ratio, "x", Evidence.SYNTHESISED, library)

                published = Quantity(figure, "x", Evidence.PUBLISHED, _REFERENCE)
                found.append(
                    Claim(f"{name} over {peer}, {what}", library, published, ours,
                          tolerance if library == "osu018" else None,
                          "best area x period of five scripts; ours passes infinity and NaN in FP16 x UINT4")
                )  # fmt: skip
    return tuple(found)
