"""L-Mul in networks: products, gradients, attention, and what is replaced."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.models.integer import integer_attention, integer_execution
from bitwright.models.logarithmic_layers import (
    LogarithmicLinear,
    LogarithmicProducts,
    calibrated_offsets,
    logarithmic_attention,
    product,
    with_logarithmic_products,
)


def test_layers_are_the_products_of_the_arithmetic():
    torch.manual_seed(0)
    linear, x = nn.Linear(33, 7), torch.randn(2, 5, 33)
    found = LogarithmicLinear(linear, LogarithmicProducts(3))(x)
    expected = lmul.matmul(x.reshape(-1, 33).numpy(), linear.weight.detach().numpy().T, 3).reshape(2, 5, 7)
    assert np.array_equal(found.detach().numpy(), expected + linear.bias.detach().numpy())


def test_gradients_are_those_of_the_exact_product():
    torch.manual_seed(0)
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    weights = torch.randn(4, 3)
    (product(a, b) * weights).sum().backward()
    assert torch.equal(a.grad, weights @ b.detach().T)
    assert torch.equal(b.grad, a.detach().T @ weights)


@pytest.mark.parametrize(("heads", "kv_heads", "causal"), [(2, 2, False), (4, 2, True), (3, 1, True)])
def test_attention(heads, kv_heads, causal):
    """Close to exact attention; equal to it for exact products of whole mantissas; masks hide what they should."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, 6, 8), torch.randn(2, kv_heads, 6, 8), torch.randn(2, kv_heads, 6, 8)
    found = logarithmic_attention(q, k, v, is_causal=causal, enable_gqa=True, how=LogarithmicProducts(7))
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    exact = logarithmic_attention(q, k, v, is_causal=causal, enable_gqa=True, how=LogarithmicProducts(23, "product"))
    torch.testing.assert_close(exact, expected)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(
        logarithmic_attention(q, k, v, attn_mask=mask, enable_gqa=True, how=LogarithmicProducts()),
        logarithmic_attention(q, k, v, is_causal=True, enable_gqa=True, how=LogarithmicProducts()),
    )


def test_a_classifier_trains_through_it():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    labels = (x[:, :4].sum(1) > 0).long()
    model = with_logarithmic_products(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)), mantissa=3)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimiser.step()
    assert (model(x).argmax(1) == labels).float().mean() > 0.95


def test_scopes_and_bad_input():
    network = nn.Sequential(nn.Linear(4, 4))
    twin = with_logarithmic_products(network, "linear")
    assert isinstance(twin[0], LogarithmicLinear)
    assert isinstance(network[0], nn.Linear)
    assert twin[0].weight is network[0].weight
    with pytest.raises(BitwrightError, match="no linear layers to replace"):
        with_logarithmic_products(nn.Sequential(nn.ReLU()), "linear")
    with pytest.raises(InputError, match="L-Mul products in attention reach nothing"):
        with_logarithmic_products(network, "attention")(torch.ones(1, 4))
    with pytest.raises(UnknownNameError):
        with_logarithmic_products(network, "heads")
    with pytest.raises(InputError, match="not 5"):
        with_logarithmic_products(network, mantissa=5)
    three, two = torch.ones(1, 3, 2, 4), torch.ones(1, 2, 2, 4)
    with pytest.raises(InputError, match="multiple"):
        logarithmic_attention(three, two, two, enable_gqa=True, how=LogarithmicProducts())
    with pytest.raises(UnknownNameError, match="linear layer"):
        with_logarithmic_products(network, "linear", offset={"1": 0.1})
    with pytest.raises(InputError, match="adder form"):
        with_logarithmic_products(network, form="algebraic", accumulation="bf16")
    with pytest.raises(InputError, match="offset"):
        with_logarithmic_products(network, offset=1.5)
    with pytest.raises(BitwrightError, match="reached no linear"):
        calibrated_offsets(network, lambda model: None)


def test_constants_from_data_move_layers_less():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)), torch.randn(200, 64)
    offsets = calibrated_offsets(network, lambda model: model(x), mantissa=4)
    assert sorted(offsets) == ["0", "2"]
    twin = with_logarithmic_products(network, "linear", 4, offset=offsets)
    assert twin[0].how.offset == offsets["0"]

    def error(changed):
        return float((changed[0](x) - network[0](x)).square().mean())

    with torch.no_grad():
        plain, none = (
            error(with_logarithmic_products(network, "linear", 4, offset=each)) for each in ("paper", "none")
        )
        assert error(twin) <= min(plain, none) * 1.02


def test_few_bit_sums_reach_the_layers():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 8, bias=False), torch.randn(5, 64)
    found = with_logarithmic_products(nn.Sequential(linear), mantissa=3, accumulation="fp8_e4m3/16")(x)
    assert torch.equal(found, found.to(torch.float8_e4m3fn).float())
    assert not torch.equal(found, with_logarithmic_products(nn.Sequential(linear), mantissa=3)(x))


def test_a_common_bias_is_cancelled_by_normalisation_only():
    """Blocks x + W(x) drift in scale with L-Mul; a norm in front of what follows takes the drift out of its input."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return x + self.linear(x)

    stack, x = nn.Sequential(*(Block() for _ in range(8))), torch.randn(256, 64)
    with torch.no_grad():
        for block in stack:
            block.linear.weight.copy_(0.5 * torch.eye(64) + 0.02 * torch.randn(64, 64))
        expected, found = stack(x), with_logarithmic_products(stack, mantissa=3, form="adder")(x)
        scale = float((found * expected).sum() / expected.square().sum())
        relative = float((found - expected).norm() / expected.norm())
        normed, other = (functional.rms_norm(each, (64,)) for each in (expected, found))
        after = float((other - normed).norm() / normed.norm())
    assert scale > 1.08
    assert after < 0.6 * relative


@pytest.mark.parametrize("mantissa", [2, 3, 7])
def test_constants_are_those_of_the_mantissa(mantissa):
    torch.manual_seed(1)
    network, x = nn.Sequential(nn.Linear(48, 24)), torch.randn(40, 48)
    found = calibrated_offsets(network, lambda model: model(x), mantissa)
    weight = network[0].weight.detach().numpy().T
    assert found == {"0": lmul.best_matmul_offset(x.numpy(), weight, mantissa)}
    assert found["0"] != lmul.best_matmul_offset(x.numpy(), weight, 4)  # that of the default


class Attention(nn.Module):
    """Attention through torch's function, with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x)
        return functional.scaled_dot_product_attention(x, x, x, scale=0.3)


class Open(Attention):
    attend = staticmethod(functional.scaled_dot_product_attention)

    def forward(self, x):
        x = self.linear(x)
        return self.attend(x, x, x, scale=0.3)


@pytest.mark.parametrize(
    ("convert", "attend"),
    [(lambda model: with_logarithmic_products(model, "all", 3),
      lambda *rows: logarithmic_attention(*rows, scale=0.3, how=LogarithmicProducts(3))),
     (integer_execution, lambda *rows: integer_attention(*rows, scale=0.3))],
)  # fmt: skip
def test_attention_of_both_kinds_is_replaced(convert, attend):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 8)
    network = nn.Sequential(Open(), Attention()).eval()
    with torch.no_grad():
        converted, expected = convert(network), x
        for each in converted:
            rows = each.linear(expected)
            expected = attend(rows, rows, rows)
        assert torch.equal(converted(x), expected)
        assert not torch.allclose(converted(x), network(x), rtol=1e-3)
    with pytest.raises(InputError, match="dropout"):
        attend(x, x, x, None, 0.1)


def test_a_network_without_attention_says_so_when_it_runs():
    with pytest.raises(InputError, match="L-Mul products in attention reach nothing"):
        with_logarithmic_products(nn.Sequential(nn.Linear(8, 8)), "attention")(torch.zeros(2, 8))
    assert with_logarithmic_products(nn.Sequential(nn.Linear(8, 8)), "all")(torch.zeros(2, 8)).shape == (2, 8)
