"""System 32: bipolar integers, products of one-bit planes (arXiv 2409.17870, 2508.19087)."""

from __future__ import annotations

import numpy as np

from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.bit_plane_matmul import Form, gpu_speed_up, matmul, pack
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.bit_plane_matmul.matmul",
    "bitwright.kernels.bit_plane_matmul.from_signed",
    "bitwright.arithmetic.formats.elements.BipolarElement",
)
FORMS: tuple[Form, ...] = ("xor", "and")
_PAPER = "arXiv 2409.17870, abstract (version 2)"
_EXACT = "follows from the format of arXiv 2409.17870"


def exact_products() -> tuple[int, int]:
    """Products of all 64 pairs of widths that equal integer arithmetic in both forms, and how many were tried."""
    rng, right, tried = np.random.default_rng(0), 0, 0
    for p in range(1, 9):
        for q in range(1, 9):
            w, a = (
                rng.integers(0, 1 << p, (9, 1000)).astype(np.uint8),
                rng.integers(0, 1 << q, (7, 1000)).astype(np.uint8),
            )
            left, right_side = (2 * x.astype(np.int64) - ((1 << bits) - 1) for x, bits in ((w, p), (a, q)))
            for form in FORMS:
                found = matmul(pack(w, p), pack(a, q), form=form)
                right += bool((found == left @ right_side.T).all())
                tried += 1
    return right, tried


def claims() -> tuple[Claim, ...]:
    """Exactness and what peaks allow. CPU speed is in `benchmarks/bit_plane_matmul.py`, networks are not run yet."""

    def exact() -> Quantity:
        right, tried = exact_products()
        return Quantity(100 * right / tried, "%", Evidence.EXECUTED, f"{right} of {tried}")

    def best() -> Quantity:
        shapes = [(m, n, k) for m in (4096, 11008) for n in (1, 16, 64, 4096) for k in (4096, 11008)]
        ratios = {(shape, bits): gpu_speed_up("RTX 3090", *shape, *bits)["speed_up"]
                  for shape in shapes for bits in ((1, 1), (1, 2), (2, 2))}  # fmt: skip
        (shape, bits), value = max(ratios.items(), key=lambda item: item[1])
        return Quantity(value, "x", Evidence.PREDICTED, f"W{bits[0]}A{bits[1]}, {shape}, both at their peaks")

    def even() -> Quantity:
        return Quantity(gpu_speed_up("RTX 3090", 4096, 4096, 4096, 2, 2)["compute"], "x", Evidence.PREDICTED)

    return (
        Claim("products equal to integer arithmetic", "1 to 8 by 1 to 8 bits, XOR and AND forms, K = 1,000",
              Quantity(100, "%", Evidence.PUBLISHED, _EXACT), exact, 0.0),
        Claim("speed over int4 products", "RTX 3090, best shape and width up to W2A2",
              Quantity(2.4, "x", Evidence.PUBLISHED, _PAPER), best, None,
              "both sides at vendor peaks; the published peer is a library below its peak"),
        Claim("speed over int4 products", "RTX 3090, W2A2, compute-bound",
              Quantity(1.0, "x", Evidence.PUBLISHED, "vendor peaks: 2,272 and 568 TOPS"), even, 0.01),
    )  # fmt: skip
