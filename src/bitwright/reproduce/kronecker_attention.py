"""System 56: third- and higher-order attention, exact and by polynomials (arXiv 2310.04064)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.higher_order_attention import higher_order_attention, khatri_rao, work
from bitwright.kernels.polynomial_attention import exponential_polynomial, low_rank_attention, low_rank_work, plan
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.higher_order_attention.higher_order_attention",
    "bitwright.kernels.higher_order_attention.work",
    "bitwright.kernels.polynomial_attention.plan",
    "bitwright.kernels.polynomial_attention.low_rank_attention",
)
_PAPER = "arXiv 2310.04064"
_CHANNELS, _ERROR = 4, 1e-2
_SIZES = (256, 1024, 8192)


def _operands(n: int, size: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(n)
    q, k1, k2 = ((2 * torch.rand(n, _CHANNELS, generator=generator, dtype=torch.float64) - 1) * size for _ in range(3))
    v1, v2 = torch.rand(2, n, _CHANNELS, generator=generator, dtype=torch.float64).unbind()
    return q, [k1, k2], [v1, v2]


def tame(n: int) -> float:
    """Entries that grow slower than the theorem's (log n)^(1/3)."""
    return float(0.75 * math.log(n) ** 0.25)


@cache
def degree_needed(n: int) -> int:
    """Degree at which results are certain to 1e-2 for entries of `tame` size."""
    return plan(*_operands(n, tame(n)), _ERROR).degree


def growth(low_rank: bool) -> float:
    """Exponent of n in counted operations between 256 and 8,192 tokens, third order, entries of `tame` size."""
    counts = []
    for n in (_SIZES[0], _SIZES[-1]):
        made = (low_rank_work(n, [n, n], _CHANNELS, _CHANNELS, degree_needed(n)) if low_rank
                else work(n, [n, n], _CHANNELS, _CHANNELS))  # fmt: skip
        counts.append(sum(made.operations.values()))
    return math.log(counts[1] / counts[0]) / math.log(_SIZES[-1] / _SIZES[0])


def worst_over_bound(trials: int = 40) -> float:
    """Largest error of the polynomial form over its bound, random entries up to 1.5, degrees 4 to 12."""
    worst = 0.0
    for seed in range(trials):
        q, ks, vs = _operands(40 + seed, 0.6 + 0.9 * (seed % 10) / 9)
        degree = 4 + 2 * (seed % 5)
        if plan(q, ks, vs, 0.9).mode == "exact" and exponential_polynomial(degree, 4.0)[1] >= 1:
            continue
        made, bound = low_rank_attention(q, ks, vs, degree)
        expected = torch.softmax(q @ khatri_rao(ks).T / _CHANNELS, -1) @ khatri_rao(vs)
        worst = max(worst, float((made - expected).abs().max()) / bound)
    return worst


def triples_found(instances: int = 1000, tokens: int = 24, modulus: int = 16) -> float:
    """Share of random instances in which one layer of width 4 tells for every token whether two others make its sum
    zero modulo `modulus`."""
    rng = np.random.default_rng(0)
    scale = 8 * math.log(tokens**2) / (1 - math.cos(2 * math.pi / modulus))
    right = 0
    for _ in range(instances):
        x = rng.integers(0, modulus, tokens)
        angle = torch.from_numpy(2 * np.pi * x / modulus)
        c, s = angle.cos(), angle.sin()
        q, k1, k2 = (torch.stack(each, -1) for each in ((c, -s, -s, -c), (c, s, c, s), (c, c, s, s)))
        seen = higher_order_attention(q, [k1, k2], [k1, k2], scale=scale, return_lse=True)[1] > scale - 0.5
        total = (x[:, None, None] + x[None, :, None] + x[None, None]) % modulus
        right += bool((seen.numpy() == (total == 0).any((1, 2))).all())
    return right / instances


def claims() -> tuple[Claim, ...]:
    """Growth of work, certificates, the regime beyond which no polynomial helps, and triple detection."""

    def counted(low_rank: bool) -> Callable[[], Quantity]:
        note = "counted operations, 256 to 8,192 tokens, degrees {} to {}".format(*map(degree_needed, (256, 8192)))
        return lambda: Quantity(growth(low_rank), "", Evidence.PREDICTED, note if low_rank else "counted operations")

    def bound() -> Quantity:
        return Quantity(worst_over_bound(), "x", Evidence.EXECUTED, "40 trials, entries up to 1.5, degrees 4 to 12")

    def refused() -> Quantity:
        wild = plan(*_operands(512, 2.5 * math.log(512) ** (1 / 3)), 0.05)
        return Quantity(float(wild.mode == "exact"), "", Evidence.PREDICTED, wild.reason)

    def found() -> Quantity:
        return Quantity(100 * triples_found(), "%", Evidence.EXECUTED, "1,000 instances of 24 numbers modulo 16")

    return (
        Claim("exponent of the tokens in operations", "third order, entries 0.75 (log n)^(1/4), error 1e-2, low rank",
              Quantity(1.0, "", Evidence.PUBLISHED, f"{_PAPER}, theorem 1.3: n^(1 + o(1))"), counted(True), 0.3,
              "The degree that the error needs grows with the entries."),
        Claim("exponent of the tokens in operations", "third order, exact",
              Quantity(3.0, "", Evidence.PUBLISHED, f"{_PAPER}: all triples"), counted(False), 0.01),
        Claim("largest error over its bound", "low rank, random entries",
              Quantity(1.0, "x", Evidence.PUBLISHED, f"{_PAPER}: entry-wise error"), bound, 0.0,
              "The bound is known before anything runs.", "lower"),
        Claim("entries beyond the theorem's are refused", "2.5 (log n)^(1/3), 512 tokens, rank up to 50,000",
              Quantity(1.0, "", Evidence.PUBLISHED, f"{_PAPER}, theorem 1.4: no faster way"), refused, 0.0),
        Claim("instances of triple detection answered", "one layer of width 4, no training",
              Quantity(100.0, "%", Evidence.PUBLISHED, f"{_PAPER}, introduction"), found, 0.0),
    )  # fmt: skip
