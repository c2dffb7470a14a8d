"""Attention to tuples of tokens in near-linear time, where logits are small: a polynomial in the place of exp.

A polynomial of the logits has low rank: with monomials of the channels as features, U1 (queries) and U2, U3, .. (keys),

    sum over all tuples of P(logit) value = U1 [(U2^T V1) * (U3^T V2) * ..],   rank C(d + degree, degree)

so that no tuple is visited. What counts is the relative error eps of P against exp on the interval of the logits:
weights are then off by at most that, and results by at most 2 eps / (1 - eps) times the largest product of values,
which is known before anything runs. The interval, and with it the degree, grows with the entries: this pays where
attention is close to an average and fails where it selects (one of n^2 pairs needs a logit 2 ln n above the others).

Source: arXiv 2310.04064, section 4 (polynomial method, low-rank factors); theorems 1.3 and 1.4 (regime).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations_with_replacement
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.higher_order_attention import _checked
from bitwright.kernels.work import Work

Polynomial = Literal["minimax", "even Taylor"]
MOST_DEGREE, MOST_RANK = 30, 50_000
_NODES, _GRID = 401, 8001  # points of the interval where a polynomial is fitted, and where its error is looked at
_SLACK = 1.02  # between them
_PRECISION = 1e-12  # relative errors below this are lost in float64 sums
Floats = NDArray[np.float64]


@lru_cache(256)
def exponential_polynomial(
    degree: int, largest: float, kind: Polynomial = "minimax"
) -> tuple[tuple[float, ...], float]:
    """Coefficients a_0 .. a_degree of P, and eps: |P(x) / e^x - 1| <= eps for |x| <= `largest`.

    "minimax" makes eps nearly as small as possible (Lawson's iteration on Chebyshev polynomials with the weight e^-x);
    "even Taylor" is positive everywhere. Raises InputError for degrees outside 0 to 30 and for odd Taylor degrees.
    """
    if not 0 <= degree <= MOST_DEGREE or not 0 <= largest < 500:
        raise InputError(f"Degree {degree} for logits up to {largest:g}: expected 0 to {MOST_DEGREE}, and below 500.")
    nodes, x = (np.cos(np.pi * np.arange(count) / (count - 1)) for count in (_NODES, _GRID))
    if kind == "even Taylor":
        if degree % 2:
            raise InputError(f"A Taylor polynomial of degree {degree} is not positive everywhere; take an even one.")
        found = np.array([1 / math.factorial(each) for each in range(degree + 1)])
    elif kind == "minimax":
        basis = np.polynomial.chebyshev.chebvander(nodes, degree) * np.exp(-nodes * largest)[:, None]
        weights, best, series = np.full(_NODES, 1 / _NODES), math.inf, np.zeros(degree + 1)
        for _ in range(40):
            root = np.sqrt(weights)[:, None]
            fitted = np.linalg.lstsq(basis * root, root[:, 0], rcond=None)[0]
            error = np.abs(basis @ fitted - 1)
            if error.max() < best:
                best, series = float(error.max()), fitted
            weights = weights * error
            weights /= max(weights.sum(), 1e-300)
        powers = np.polynomial.chebyshev.cheb2poly(series)
        found = np.zeros(degree + 1)
        found[: len(powers)] = powers / (largest or 1.0) ** np.arange(len(powers))
    else:
        raise UnknownNameError("polynomial", kind, ("minimax", "even Taylor"))
    values = np.polynomial.polynomial.polyval(x * largest, found) * np.exp(-x * largest)
    return tuple(found.tolist()), float(np.abs(values - 1).max()) * _SLACK + _PRECISION


@dataclass(frozen=True)
class Plan:
    """Which way is taken and why: `mode` "exact" or "low-rank"; the largest logit possible; the polynomial's degree,
    the rank of its features, and the bound of the absolute error of results; multiply-adds of both ways; `reason`."""

    mode: Literal["exact", "low-rank"]
    largest_logit: float
    degree: int
    rank: int
    error_bound: float
    exact_operations: float
    low_rank_operations: float
    reason: str


def largest_logit(q: Tensor, ks: Sequence[Tensor], scale: float) -> float:
    """A bound of all |logits|, from the largest entry of each key channel: O(n d)."""
    bound = q.abs()
    for k in ks:
        bound = bound * k.abs().amax(-2, keepdim=True)
    return abs(scale) * float(bound.sum(-1).max())


def _value_bound(vs: Sequence[Tensor]) -> float:
    bound = vs[0].abs().amax(-2)
    for v in vs[1:]:
        bound = bound * v.abs().amax(-2)
    return float(bound.max())


def plan(
    q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], error: float = 1e-4, *, scale: float | None = None,
    most_rank: int = MOST_RANK,
) -> Plan:  # fmt: skip
    """The cheaper of both ways that keeps the error of results below `error` times the largest product of values.

    Raises InputError as `higher_order_attention`, and for errors that are not between 1e-11 and 1.
    """
    _checked(q, ks, vs, False, None)
    if not 1e-11 <= error < 1:
        raise InputError(f"An error of {error:g} asked for; expected 1e-11 (float64 sums) to 1.")
    factor = 1 / q.shape[-1] if scale is None else scale
    largest, values, channels = largest_logit(q, ks, factor), _value_bound(vs), q.shape[-1]
    tokens = [k.shape[-2] for k in ks]
    exact = 2.0 * q.shape[-2] * math.prod(tokens) * (channels + vs[0].shape[-1])
    degree, eps = -1, math.inf
    if largest < 500:
        for degree in range(MOST_DEGREE + 1):
            if math.comb(channels + degree, degree) > most_rank:
                break
            eps = exponential_polynomial(degree, largest)[1]
            if 2 * eps / max(1 - eps, 1e-9) <= error:
                break
    rank = math.comb(channels + max(degree, 0), max(degree, 0))
    relative = 2 * eps / (1 - eps) if eps < 1 else math.inf
    cheap = 2.0 * rank * (q.shape[-2] + sum(tokens)) * (vs[0].shape[-1] + 1)
    selects = f"one tuple stands out from a logit of {math.log(math.prod(tokens)):.3g} above the others"
    if relative > error or rank > most_rank:
        reason = f"no polynomial of up to {MOST_DEGREE} degrees and rank {most_rank} holds logits up to {largest:.3g}"
        return Plan("exact", largest, degree, rank, 0.0, exact, math.inf, f"{reason}; {selects}")
    mode: Literal["exact", "low-rank"] = "low-rank" if cheap < exact else "exact"
    bound = relative * values if mode == "low-rank" else 0.0
    return Plan(mode, largest, degree, rank, bound, exact, cheap, f"logits up to {largest:.3g}; {selects}")


@cache
def _exponents(channels: int, degree: int) -> tuple[tuple[int, int], ...]:
    """Monomials of up to `degree`, degree by degree: (the monomial it comes from, the channel it is multiplied by)."""
    index: dict[tuple[int, ...], int] = {(): 0}
    found = []
    for size in range(1, degree + 1):
        for chosen in combinations_with_replacement(range(channels), size):
            index[chosen] = len(index)
            found.append((index[chosen[:-1]], chosen[-1]))
    return tuple(found)


def monomials(x: Tensor, degree: int) -> Tensor:
    """All monomials of the channels of x (..., n, d) of up to `degree`: (..., n, C(d + degree, degree)), float64."""
    x = x.double()
    found = x.new_ones(*x.shape[:-1], math.comb(x.shape[-1] + degree, degree))
    at = 1
    parents = torch.tensor(_exponents(x.shape[-1], degree), dtype=torch.int64).reshape(-1, 2)
    for size in range(1, degree + 1):
        end = math.comb(x.shape[-1] + size, size)
        parent, channel = parents[at - 1 : end - 1].T
        found[..., at:end] = found[..., parent] * x[..., channel]
        at = end
    return found


@cache
def _multinomials(channels: int, degree: int) -> Floats:
    """Multinomial coefficient of every monomial, and its degree in the second row."""
    found = [(1.0, 0.0)]
    for size in range(1, degree + 1):
        for chosen in combinations_with_replacement(range(channels), size):
            counts = [chosen.count(each) for each in set(chosen)]
            found.append((math.factorial(size) / math.prod(math.factorial(each) for each in counts), float(size)))
    return np.array(found).T


def low_rank_attention(
    q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], degree: int, *, scale: float | None = None,
    polynomial: Polynomial = "minimax", most_rank: int = MOST_RANK,
) -> tuple[Tensor, float]:  # fmt: skip
    """`higher_order_attention` without masks by a polynomial of `degree`: results in the type of q, and the bound of
    their absolute error. Sums are float64.

    Raises InputError as it does, for ranks above `most_rank`, and where the polynomial is too coarse for the logits (a
    relative error of 1 or more, so that sums of weights may not be positive).
    """
    _checked(q, ks, vs, False, None)
    factor = 1 / q.shape[-1] if scale is None else scale
    channels, largest = q.shape[-1], largest_logit(q, ks, factor)
    rank = math.comb(channels + max(degree, 0), max(degree, 0))
    if rank > most_rank:
        raise InputError(
            f"Degree {degree} of {channels} channels has rank {rank}, above {most_rank}; take a lower degree."
        )
    if largest >= 500:
        raise InputError(f"Logits up to {largest:.3g} are beyond every polynomial; use higher_order_attention.")
    coefficients, eps = exponential_polynomial(degree, largest, polynomial)
    if eps >= 1:
        raise InputError(
            f"A polynomial of degree {degree} is off by {eps:.2g} for logits up to {largest:.3g}: sums of weights may "
            "not be positive. Take a higher degree, smaller entries, or higher_order_attention."
        )
    table = _multinomials(channels, degree)
    sizes = table[1].astype(int)
    factors = torch.from_numpy(np.array(coefficients)[sizes] * table[0] * factor**sizes)
    features = monomials(q, degree) * factors
    top: Tensor | None = None
    bottom: Tensor | None = None
    for k, v in zip(ks, vs, strict=True):
        u = monomials(k, degree)
        mixed, total = u.transpose(-1, -2) @ v.double(), u.sum(-2)
        top = mixed if top is None else top * mixed
        bottom = total if bottom is None else bottom * total
    assert top is not None
    assert bottom is not None
    out = (features @ top) / (features @ bottom[..., None])
    return out.to(q.dtype), 2 * eps / (1 - eps) * _value_bound(vs)


def low_rank_work(queries: int, keys: Sequence[int], channels: int, value_channels: int, degree: int) -> Work:
    """One multiplication per monomial of every token, and the products with values and ones, in float64."""
    rank = math.comb(channels + degree, degree)
    tokens = queries + sum(keys)
    return Work({"fp64": float(rank) * tokens * (1 + 2 * (value_channels + 1))}, {"memory": 8.0 * rank * tokens})
