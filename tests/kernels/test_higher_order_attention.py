"""Attention to tuples of tokens against sums over all tuples in float64, and the bounds of its polynomial form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.higher_order_attention import higher_order_attention, khatri_rao, work
from bitwright.kernels.polynomial_attention import (
    exponential_polynomial,
    largest_logit,
    low_rank_attention,
    low_rank_work,
    monomials,
    plan,
)

Sets = list[torch.Tensor]


def operands(n: int, d: int, sets: int = 2, batch: tuple[int, ...] = (), size: float = 1.0, seed: int = 0):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return (2 * torch.rand(*batch, n, d, generator=generator, dtype=torch.float64) - 1) * size

    return draw(), [draw() for _ in range(sets)], [draw() for _ in range(sets)]


def reference(q: torch.Tensor, ks: Sets, vs: Sets, scale: float, seen: torch.Tensor | None = None) -> torch.Tensor:
    """From all tuples at once."""
    logits = q @ khatri_rao(ks).transpose(-1, -2) * scale
    if seen is not None:
        logits = logits.masked_fill(~seen, -math.inf)
    return torch.softmax(logits, -1) @ khatri_rao(vs)


def test_rows_of_a_khatri_rao_product() -> None:
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    made = khatri_rao([a, b])
    assert made.shape == (15, 4)
    assert torch.equal(made[2 * 5 + 3], a[2] * b[3])
    assert torch.equal(khatri_rao([a, b, a])[(1 * 5 + 4) * 3 + 2], a[1] * b[4] * a[2])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 6), st.integers(1, 3), st.sampled_from([None, 1.0, 30.0]), st.integers(0, 99))
def test_equals_the_sum_over_all_tuples(n: int, d: int, sets: int, scale: float | None, seed: int) -> None:
    n = min(n, 18) if sets == 3 else n
    q, ks, vs = operands(n, d, sets, (2,), 2.0, seed)
    expected = reference(q, ks, vs, 1 / d if scale is None else scale)
    assert torch.allclose(higher_order_attention(q, ks, vs, scale=scale), expected, rtol=1e-10, atol=1e-12)


def test_two_sets_of_one_are_ordinary_attention() -> None:
    q, ks, vs = operands(40, 8, 1, (2, 3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, ks[0], vs[0], scale=0.4)
    made, lse = higher_order_attention(q, ks, vs, scale=0.4, return_lse=True)
    assert torch.allclose(made, expected, atol=1e-12)
    assert torch.allclose(lse, torch.logsumexp(q @ ks[0].transpose(-1, -2) * 0.4, -1), atol=1e-12)


def test_blocks_of_different_lengths_and_large_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k1, k2 = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (300, 90, 70))
    v1, v2 = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (90, 70))
    logits = q @ khatri_rao([k1, k2]).T
    scale = 500 / float(logits.abs().max())
    made = higher_order_attention(q, [k1, k2], [v1, v2], scale=scale)
    assert torch.allclose(made, reference(q, [k1, k2], [v1, v2], scale), atol=1e-10)


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("sets", [1, 2, 3])
def test_causal_and_windowed(window: int | None, sets: int) -> None:
    n = 300 if sets == 1 else 40 if sets == 2 else 14
    q, ks, vs = operands(n, 4, sets)
    places = torch.cartesian_prod(*[torch.arange(n)] * sets).reshape(-1, sets)
    i = torch.arange(n)[:, None]
    seen = places.amax(1)[None] <= i
    if window is not None:
        seen &= places.amin(1)[None] > i - window
    expected = reference(q, ks, vs, 0.25, seen)
    assert torch.allclose(higher_order_attention(q, ks, vs, causal=True, window=window), expected, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 3}])
@pytest.mark.parametrize("sets", [1, 2, 3])
def test_gradients(options: dict[str, object], sets: int) -> None:
    q, ks, vs = operands(6, 3, sets)
    given = tuple(each.requires_grad_() for each in (q, *ks, *vs))
    assert torch.autograd.gradcheck(
        lambda q, *rest: higher_order_attention(q, rest[:sets], rest[sets:], scale=1.0, **options),
        given,  # type: ignore[arg-type]
    )


def test_memory_is_linear() -> None:
    """256 queries of 256 x 256 pairs: all logits would be 134 MB in float64, a block of them is 8."""
    from torch.profiler import ProfilerActivity, profile

    q, ks, vs = operands(256, 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        higher_order_attention(q, ks, vs)
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert largest < 20e6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 8), st.floats(0.1, 1.4), st.integers(1, 3), st.integers(0, 99))
def test_errors_stay_below_their_bound(d: int, degree: int, size: float, sets: int, seed: int) -> None:
    q, ks, vs = operands(12, d, sets, (), size, seed)
    if exponential_polynomial(degree, largest_logit(q, ks, 1 / d))[1] >= 1:
        with pytest.raises(InputError, match="not be positive"):
            low_rank_attention(q, ks, vs, degree)
        return
    made, bound = low_rank_attention(q, ks, vs, degree)
    expected = reference(q, ks, vs, 1 / d)
    assert (made - expected).abs().max() <= bound
    assert bound < 1e-3 or degree < 6 or size > 1


def test_features_are_those_of_the_polynomial() -> None:
    q, ks, vs = operands(9, 3)
    made, _ = low_rank_attention(q, ks, vs, 5)
    coefficients, _ = exponential_polynomial(5, largest_logit(q, ks, 1 / 3))
    weights = torch.from_numpy(np.polynomial.polynomial.polyval((q @ khatri_rao(ks).T / 3).numpy(), coefficients))
    expected = (weights @ khatri_rao(vs)) / weights.sum(1, keepdim=True)
    assert torch.allclose(made, expected, rtol=1e-10, atol=1e-10)
    assert monomials(q, 5).shape == (9, math.comb(8, 5))


@pytest.mark.parametrize(("largest", "degree"), [(0.5, 4), (2.0, 8), (5.0, 12), (9.0, 16)])
def test_polynomials_against_exp(largest: float, degree: int) -> None:
    x = np.linspace(-largest, largest, 12_345)
    found = {}
    for kind in ("minimax", "even Taylor"):
        coefficients, eps = exponential_polynomial(degree, largest, kind)  # type: ignore[arg-type]
        error = np.abs(np.polynomial.polynomial.polyval(x, coefficients) / np.exp(x) - 1).max()
        assert error <= eps <= 1.1 * error + 1e-11
        found[kind] = eps
    assert found["minimax"] < 0.2 * found["even Taylor"]


def test_the_planner_takes_what_is_cheaper_and_says_why() -> None:
    q, ks, vs = operands(400, 4)
    taken = plan(q, ks, vs, 1e-3)
    assert taken.mode == "low-rank"
    made, bound = low_rank_attention(q, ks, vs, taken.degree)
    assert bound == pytest.approx(taken.error_bound)
    assert (made - higher_order_attention(q, ks, vs)).abs().max() <= bound <= 1e-3
    few = plan(*operands(5, 4), 1e-6)
    assert few.mode == "exact"
    assert few.exact_operations < few.low_rank_operations
    far = plan(*operands(50, 4, size=6.0), 1e-3)
    assert far.mode == "exact"
    assert "no polynomial" in far.reason
    assert far.low_rank_operations == math.inf


def test_degrees_grow_with_the_entries_beyond_the_theorem() -> None:
    """Entries of (log n)^(1/4) stay cheap, those of 2.5 (log n)^(1/3) do not."""
    tame = [plan(*operands(n, 4, size=math.log(n) ** 0.25), 0.05).degree for n in (64, 512)]
    assert tame[-1] <= 20
    wild = plan(*operands(512, 4, size=2.5 * math.log(512) ** (1 / 3)), 0.05)
    assert wild.mode == "exact"


def test_triples_that_sum_to_zero_are_found() -> None:
    """Match3: one layer of width 4 sees whether j and k exist with x_i + x_j + x_k = 0 mod M."""
    rng = np.random.default_rng(0)
    modulus, n = 16, 24
    scale = 8 * math.log(n * n) / (1 - math.cos(2 * math.pi / modulus))
    for _ in range(20):
        x = rng.integers(0, modulus, n)
        a = torch.from_numpy(2 * np.pi * x / modulus)
        c, s = a.cos(), a.sin()
        q, k1, k2 = (torch.stack(each, -1) for each in ((c, -s, -s, -c), (c, s, c, s), (c, c, s, s)))
        lse = higher_order_attention(q, [k1, k2], [k1, k2], scale=scale, return_lse=True)[1]
        total = x[:, None, None] + x[None, :, None] + x[None, None]
        assert np.array_equal((lse > scale - 0.5).numpy(), (total % modulus == 0).any((1, 2)))


def test_work() -> None:
    counted = work(10, [20, 30], 4, 6)
    assert counted.operations["matrix fp32"] == 2 * 10 * 600 * 10
    assert counted.traffic["memory"] == 4 * (10 * 10 + 50 * 10)
    one, two = (low_rank_work(n, [n, n], 4, 4, 6).operations["fp64"] for n in (100, 200))
    assert two == 2 * one


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, ks, vs: higher_order_attention(q, ks, vs[:1]), InputError, "as many"),
        (lambda q, ks, vs: higher_order_attention(q, [], []), InputError, "at least one"),
        (lambda q, ks, vs: higher_order_attention(q, [ks[0], ks[1][:3]], vs), InputError, "do not fit"),
        (lambda q, ks, vs: higher_order_attention(q.float(), ks, vs), InputError, "one type"),
        (lambda q, ks, vs: higher_order_attention(q * math.nan, ks, vs), InputError, "NaN"),
        (lambda q, ks, vs: higher_order_attention(q, ks, vs, window=3), InputError, "causal=True"),
        (lambda q, ks, vs: higher_order_attention(q[:2], ks, vs, causal=True), InputError, "as many keys"),
        (lambda q, ks, vs: higher_order_attention(q, ks, vs, scale=math.inf), InputError, "finite"),
        (lambda q, ks, vs: higher_order_attention(q[:0], ks, vs), InputError, "do not fit"),
        (lambda q, ks, vs: plan(q, ks, vs, 1e-14), InputError, "1e-11"),
        (lambda q, ks, vs: low_rank_attention(q, ks, vs, 40), InputError, "rank"),
        (lambda q, ks, vs: low_rank_attention(q, ks, vs, 31, most_rank=10**9), InputError, "0 to 30"),
        (lambda q, ks, vs: low_rank_attention(9 * q, ks, vs, 1, scale=9.0), InputError, "may not be positive"),
        (lambda q, ks, vs: low_rank_attention(q, ks, vs, 3, polynomial="even Taylor"), InputError, "even one"),
        (lambda q, ks, vs: low_rank_attention(q, ks, vs, 3, polynomial="cubic"), UnknownNameError, "cubic"),
        (lambda q, ks, vs: low_rank_attention(1e5 * q, ks, vs, 3), InputError, "beyond every polynomial"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(*operands(6, 4))
