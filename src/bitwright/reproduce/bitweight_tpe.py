"""System 01: bit-weight transformations of tensor processing engines (HPCA 2025, arXiv 2503.06342).

Digit encodings and their statistics are here; gates, networks and bit-slice peers in `tensor_engine_claims`, reports
published with the paper in `tensor_engine_reports`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import encodings
from bitwright.arithmetic.statistics import digit_statistics
from bitwright.core.quantity import Evidence, Quantity
from bitwright.reproduce.claims import Claim
from bitwright.reproduce.tensor_engine_claims import all_claims

STATUS = "complete"
ENTRY_POINTS = (
    "bitwright.arithmetic.encodings.get",
    "bitwright.engine.baselines.gemm",
    "bitwright.engine.transformations.apply",
    "bitwright.engine.evaluate.run",
    "bitwright.engine.rtl.generate",
    "bitwright.engine.verify.verify",
    "bitwright.engine.engine_gates.engine_gates",
    "bitwright.engine.serial_cycles.array_cycles",
    "bitwright.engine.network_cost.network_cost",
)
_PAPER = "arXiv 2503.06342"


# Average partial products under EN-T of N(0, sigma) INT8 vectors of K operands, README of the official repository.
PARTIAL_PRODUCTS = {
    32: {10: 1.71, 20: 2.05, 30: 2.27, 40: 2.45, 50: 2.57},
    128: {10: 1.75, 20: 2.10, 30: 2.32, 40: 2.48, 50: 2.60},
}


def average_partial_products(sigma: float, depth: int, vectors: int = 1000, seed: int = 0) -> float:
    """Mean number of non-zero EN-T digits as the released test bench counts it, on vectors of `depth` operands.

    Samples of N(0, sigma) outside -128..127 are drawn again and the rest rounded. The bench adds up the digits of each
    group of four operands at one bit weight; where the last group of a vector has at most one digit, its `encode_valid`
    stays high for another cycle and the group is counted twice. That makes the published means depend on the depth.
    Source: test_opt3_pe_inner_product_vectors.sv of the official repository.
    """
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, sigma, (vectors, depth))
    while (outside := (samples < -128) | (samples > 127)).any():
        samples[outside] = rng.normal(0, sigma, int(outside.sum()))
    nonzero = encodings.get("ent").digits(np.rint(samples).astype(np.int64), 8) != 0
    counts = nonzero.reshape(vectors, depth // 4, 4, -1).sum(axis=2)
    last = counts[:, -1, -1]
    twice = last <= 1
    return float((counts.sum() + last[twice].sum()) / (counts.size + twice.sum()))


def _normal_to_127(shape: tuple[int, int]) -> NDArray[np.int8]:
    """Normal samples, the largest mapped to 127."""
    samples = np.random.default_rng(0).normal(0, 1, shape)
    codes: NDArray[np.int8] = np.rint(samples * (127 / np.abs(samples).max())).astype(np.int8)
    return codes


def _executed(value: float, unit: str) -> Quantity:
    return Quantity(value, unit, Evidence.EXECUTED)


def _digit_claims() -> list[Claim]:
    def published(value: float, unit: str = "digits") -> Quantity:
        return Quantity(value, unit, Evidence.PUBLISHED, _PAPER)

    def at_most_three() -> Quantity:
        every = np.arange(-128, 128).astype(np.int8)
        shares = digit_statistics(every, encodings.get("mbe")).shares
        return _executed(100 * float(shares[:4].sum()), "%")

    found = [
        Claim(
            "values with at most three non-zero digits", "modified Booth, all 256 INT8 values", published(68.4, "%"),
            at_most_three, 0.001,
        )
    ]  # fmt: skip
    for name, figure in (("ent", 2.22), ("mbe", 2.41)):

        def mean(name: str = name) -> Quantity:
            return _executed(digit_statistics(_normal_to_127((1024, 1024)), encodings.get(name)).mean, "digits")

        conditions = f"{name}, normal data, largest of 1024x1024 samples mapped to 127"
        found.append(Claim("mean non-zero digits", conditions, published(figure), mean, 0.03))
    for depth, row in PARTIAL_PRODUCTS.items():
        for sigma, figure in row.items():

            def counted(sigma: int = sigma, depth: int = depth) -> Quantity:
                return _executed(average_partial_products(sigma, depth), "digits")

            conditions = f"EN-T, N(0, {sigma}), K = {depth}"
            counting = "counted as the released test bench does, which takes some last groups of a vector twice"
            found.append(Claim("average partial products", conditions, published(figure), counted, 0.03, counting))
    return found


def claims() -> tuple[Claim, ...]:
    """Every claim of the paper, and what its official repository states about its own figures."""
    return (*_digit_claims(), *all_claims())
