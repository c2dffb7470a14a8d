"""Shift layers and mixtures against integer arithmetic and hand-written gradients."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bitwright.arithmetic.shift_and_add import masked_sums, powers_of_two, shift_matmul, to_fixed_point
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models.multiplication_primitives import MixtureOfPrimitives, PackedShiftLinear, ShiftLinear


def test_shifts_are_arithmetic_for_every_exponent():
    rng = np.random.default_rng(0)
    x = rng.integers(-(1 << 31), 1 << 31, (5, 60))
    exponent, sign = rng.integers(-14, 1, (60, 7)), rng.integers(-1, 2, (60, 7))
    expected = [[sum(int(s) * (int(v) >> int(-p)) for v, p, s in zip(row, exponent[:, n], sign[:, n], strict=True))
                 for n in range(7)] for row in x]  # fmt: skip
    found = shift_matmul(x, exponent, sign)
    assert np.array_equal(found, expected)
    real = x @ (sign * np.exp2(exponent))
    assert np.abs(found - real).max() < 60  # less than a unit per term


def test_masked_sums_select_rows():
    rng = np.random.default_rng(0)
    mask, v = rng.integers(0, 2, (9, 40)), rng.integers(-(1 << 20), 1 << 20, (40, 5))
    assert np.array_equal(masked_sums(mask, v), mask @ v)
    real = rng.normal(size=(40, 5))
    assert np.abs(masked_sums(mask, real) - mask @ real).max() < 1e-6
    key = rng.integers(0, 2, (40, 6))
    query = rng.integers(0, 2, (9, 6))
    assert np.array_equal(masked_sums(query, masked_sums(key.T, v)), (query @ key.T) @ v)  # linear order


@pytest.mark.parametrize("mode", ["ps", "q"])
def test_a_shift_layer_on_integers(mode):
    torch.manual_seed(0)
    linear = nn.Linear(24, 6)
    layer = ShiftLinear.from_linear(linear, mode)
    x = torch.randn(5, 24)
    weight = torch.sign(linear.weight) * torch.exp2(torch.log2(linear.weight.abs().clamp(2.0**-15, 1)).round())
    assert torch.allclose(layer(x), functional.linear(x, weight, linear.bias), atol=1e-6)
    exact = layer.integer_forward(x)
    assert (exact - layer(x)).abs().max() < 2 * 24 / 65536  # a unit of rounding of x and of each shift
    exponent, sign = layer.export()
    assert np.array_equal(to_fixed_point([1.99999, -0.00001]), [131071, -1])
    assert exponent.min() >= -14
    assert set(np.unique(sign)) <= {-1, 0, 1}


def test_native_layers_equal_the_rebuilt_ones():
    torch.manual_seed(0)
    layer = ShiftLinear(40, 9)
    x = torch.randn(2, 3, 40)
    exponent, sign = layer.export()
    sums = shift_matmul(to_fixed_point(x.reshape(-1, 40).numpy()), exponent.T, sign.T)
    assert torch.equal(PackedShiftLinear(layer)(x), torch.from_numpy(sums / 65536).float().reshape(2, 3, 9))
    assert (PackedShiftLinear(layer)(x) - layer(x)).abs().max() < 2 * 40 / 65536
    with pytest.raises(InputError, match="NaN"):
        PackedShiftLinear(layer)(torch.full((1, 40), torch.nan))


def test_straight_through_gradients():
    torch.manual_seed(0)
    x, g = torch.randn(5, 8), torch.randn(5, 3)
    layer = ShiftLinear(8, 3, "ps", bias=False)
    with torch.no_grad():
        layer.exponent.uniform_(-13, -1)
        layer.sign.uniform_(-1, 1)
    layer(x).backward(g)
    power = torch.exp2(layer.exponent.detach().round())
    sign = torch.sign(layer.sign.detach().round())
    of_weight = g.T @ x
    assert torch.allclose(layer.sign.grad, of_weight, atol=1e-6)
    assert torch.allclose(layer.exponent.grad, of_weight * sign * power * math.log(2), atol=1e-6)
    layer = ShiftLinear(8, 3, "q", bias=False)
    with torch.no_grad():
        layer.weight.uniform_(0.01, 0.9)
    layer(x).backward(g)
    weight = layer.weight.detach()
    power = torch.exp2(torch.log2(weight).round())
    assert torch.allclose(layer.weight.grad, of_weight * power / weight, atol=1e-5)
    layer = ShiftLinear(8, 3, "q", bias=False, terms=2)
    layer(x).backward(g)
    assert torch.allclose(layer.weight.grad, of_weight, atol=1e-6)  # the sum of powers as a whole


def two_powers(weight):
    """Greedy, in Python: signed powers (exponent, sign) of one weight."""
    found = []
    for _ in range(2):
        size = abs(weight)
        exponent = min(0, max(-14, round(math.log2(size)))) if size else -14
        sign = 0 if size == 0 or (found and size < 2.0**-15) else (1 if weight > 0 else -1)
        found.append((exponent, sign))
        weight -= sign * 2.0**exponent
    return found


def test_weights_as_sums_of_two_powers():
    rng = np.random.default_rng(0)
    weights = np.concatenate(
        [rng.normal(0, 0.1, 300), [0.0, 1.0, -1.0, 1.75, -3.0, 0.75, 2.0**-14, 2.0**-16, -(2.0**-20)]]
    )
    exponents, signs = powers_of_two(weights, 2)
    used = signs != 0
    for index, weight in enumerate(weights):
        for term, (exponent, sign) in enumerate(two_powers(weight)):
            assert signs[term, index] == sign
            assert not sign or exponents[term, index] == exponent
    assert exponents.min() >= -14
    assert exponents.max() <= 0
    rebuilt = (signs * np.exp2(exponents.astype(float))).sum(0)
    one = powers_of_two(weights)
    alone = one[1][0] * np.exp2(one[0][0].astype(float))
    assert np.array_equal(one[0][0][used[0]], exponents[0][used[0]])
    assert (np.abs(rebuilt - weights) <= np.abs(alone - weights)).all()
    assert rebuilt[weights == 0.75] == 0.75
    inside = (np.abs(weights) >= 2.0**-11) & (np.abs(weights) <= 1)
    assert (np.abs(alone - weights)[inside] / np.abs(weights[inside])).max() < 0.4143
    assert (np.abs(rebuilt - weights)[inside] / np.abs(weights[inside])).max() < 0.11
    assert np.square(rebuilt - weights)[inside].sum() < 0.1 * np.square(alone - weights)[inside].sum()


def test_two_terms_are_two_products_of_shifts():
    torch.manual_seed(0)
    linear = nn.Linear(40, 9)
    one, two = (ShiftLinear.from_linear(linear, "q", terms) for terms in (1, 2))
    exponents, signs = two.export()
    assert exponents.shape == signs.shape == (2, 9, 40)
    rebuilt = torch.from_numpy((signs * np.exp2(exponents.astype(float))).sum(0)).float()
    x = torch.randn(2, 3, 40)
    assert torch.allclose(two(x), functional.linear(x, rebuilt, linear.bias), atol=1e-6)
    assert (two(x) - linear(x)).norm() < 0.4 * (one(x) - linear(x)).norm()
    fixed = to_fixed_point(x.reshape(-1, 40).numpy())
    expected = np.zeros((6, 9), np.int64)
    for term, n, k in np.ndindex(2, 9, 40):
        expected[:, n] += int(signs[term, n, k]) * (fixed[:, k] >> -int(exponents[term, n, k]))
    made = (expected / 65536).astype(np.float32) + linear.bias.detach().numpy()
    assert torch.equal(PackedShiftLinear(two)(x), torch.from_numpy(made).reshape(2, 3, 9))
    assert (two.integer_forward(x) - two(x)).abs().max() < 3 * 40 / 65536  # units of rounding of x and of both shifts


def split_after_training(balance):
    torch.manual_seed(0)
    layer = MixtureOfPrimitives(8, 4, (6.0, 4.0), noise=1.0)
    with torch.no_grad():
        layer.router.bias[:] = torch.tensor([1.0, -1.0])
    optimiser = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    x = torch.randn(2048, 8)
    for _ in range(200):
        optimiser.zero_grad()
        layer(x)
        (balance * layer.balance_loss() + 0 * layer.router.weight.sum()).backward()
        optimiser.step()
    return float((layer.router(x).argmax(-1) == 0).float().mean()), layer.last[0][:, 0].mean().item()


def test_tokens_follow_the_latencies():
    _, share = split_after_training(1.0)
    assert share == pytest.approx(0.4, abs=0.05)
    _, untrained = split_after_training(0.0)
    assert untrained > 0.6


@pytest.mark.parametrize("gate_value", ["probability", "one"])
def test_dispatch_equals_both_experts_masked(gate_value):
    torch.manual_seed(0)
    layer = MixtureOfPrimitives(8, 4, (6.0, 4.0), gate_value).eval()
    for bias in (0.0, 100.0, -100.0):  # mixed, all to one expert, all to the other
        with torch.no_grad():
            layer.router.bias[:] = torch.tensor([bias, -bias])
        x = torch.randn(3, 5, 8)
        p = torch.softmax(layer.router(x), -1)
        chosen = p.argmax(-1, keepdim=True)
        dense = torch.where(chosen == 0, layer.experts[0](x), layer.experts[1](x))
        scale = p.gather(-1, chosen) if gate_value == "probability" else 1.0
        assert torch.allclose(layer(x), dense * scale, atol=1e-6)
    layer.train()
    layer(x).sum().backward()
    assert (layer.router.weight.grad is None) == (gate_value == "one")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: shift_matmul(np.ones((2, 2)), np.zeros((2, 2), int), np.ones((2, 2), int)), InputError),
        (lambda: shift_matmul(np.ones((2, 2), int), np.full((2, 2), -15), np.ones((2, 2), int)), InputError),
        (lambda: shift_matmul(np.ones((2, 3), int), np.zeros((2, 2), int), np.ones((2, 2), int)), InputError),
        (lambda: masked_sums([[2]], [[1]]), InputError), (lambda: masked_sums([[1, 1]], [[1]]), InputError),
        (lambda: to_fixed_point([np.nan]), InputError), (lambda: ShiftLinear(2, 2, "sp2"), UnknownNameError),
        (lambda: ShiftLinear(2, 2, "ps", terms=2), InputError), (lambda: ShiftLinear(2, 2, "q", terms=3), InputError),
        (lambda: powers_of_two([0.5], 3), InputError), (lambda: powers_of_two([np.inf]), InputError),
        (lambda: MixtureOfPrimitives(2, 2, (0.0, 1.0)), InputError),
        (lambda: MixtureOfPrimitives(2, 2, (1.0, 1.0)).balance_loss(), InputError),
        (lambda: MixtureOfPrimitives(2, 2, (1.0, 1.0))(torch.full((1, 2), torch.nan)), InputError),
    ],
)  # fmt: skip
def test_bad_input(call, error):
    with pytest.raises(error):
        call()
