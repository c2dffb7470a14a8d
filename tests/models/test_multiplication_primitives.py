"""Shift layers, binary attention and mixtures against integer arithmetic and hand-written gradients."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bitwright.arithmetic.shift_and_add import masked_sums, shift_matmul, to_fixed_point
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models.multiplication_primitives import (
    BinaryLinearAttention,
    MixtureOfPrimitives,
    PackedShiftLinear,
    ShiftLinear,
    binarise,
)


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
    attention = BinaryLinearAttention(12, 3).eval()
    native = copy.deepcopy(attention)
    native.native = True
    x = torch.randn(2, 70, 12)
    assert torch.allclose(native(x), attention(x), atol=1e-5)
    with pytest.raises(InputError, match="NaN"):
        PackedShiftLinear(layer)(torch.full((1, 40), torch.nan))


def test_codes_of_zeros_have_a_defined_result():
    layer = BinaryLinearAttention(8, 2)
    with torch.no_grad():
        layer.query.weight.zero_(), layer.query.bias.zero_()  # nothing exceeds the mean
    x = torch.randn(1, 5, 8)
    value = layer.value(x).reshape(1, 5, 2, 4).transpose(1, 2)
    expected = functional.normalize(0.5 * value, dim=-1) + layer.neighbours(value)
    for native in (False, True):
        layer.native = native
        assert torch.allclose(layer(x), layer.output(expected.transpose(1, 2).reshape(1, 5, 8)), atol=1e-6)


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
    value = torch.randn(4, 6, requires_grad=True)
    binarise(value).backward(torch.ones(4, 6))
    copy = value.detach().clone().requires_grad_(True)
    functional.normalize(copy, dim=-1).clamp(0, 1).backward(torch.ones(4, 6))
    assert torch.allclose(value.grad, copy.grad, atol=1e-6)


def test_attention_in_both_orders():
    torch.manual_seed(0)
    layer, x = BinaryLinearAttention(12, 3), torch.randn(2, 7, 12)

    def split(made):
        return made.reshape(2, 7, 3, 4).transpose(1, 2)

    q, k, v = binarise(split(layer.query(x))), binarise(split(layer.key(x))), split(layer.value(x))
    mixed = 0.5 * v + ((q @ k.transpose(2, 3)) @ v) / math.pi
    expected = functional.normalize(mixed, dim=-1) + layer.neighbours(v)
    assert torch.allclose(layer(x), layer.output(expected.transpose(1, 2).reshape(2, 7, 12)), atol=1e-5)
    assert torch.isfinite(layer(torch.zeros(1, 3, 12))).all()


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
        (lambda: BinaryLinearAttention(10, 3), InputError), (lambda: BinaryLinearAttention(9, 3, 4), InputError),
        (lambda: MixtureOfPrimitives(2, 2, (0.0, 1.0)), InputError),
        (lambda: MixtureOfPrimitives(2, 2, (1.0, 1.0)).balance_loss(), InputError),
        (lambda: MixtureOfPrimitives(2, 2, (1.0, 1.0))(torch.full((1, 2), torch.nan)), InputError),
    ],
)  # fmt: skip
def test_bad_input(call, error):
    with pytest.raises(error):
        call()
