"""L-Mul in networks: products, gradients, attention, and what is replaced."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.models.logarithmic_layers import (
    LogarithmicLinear,
    logarithmic_attention,
    product,
    with_logarithmic_products,
)


def test_layers_are_the_products_of_the_arithmetic():
    torch.manual_seed(0)
    linear, x = nn.Linear(33, 7), torch.randn(2, 5, 33)
    found = LogarithmicLinear(linear, 3)(x)
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
def test_attention_with_23_bits_is_close_and_in_order(heads, kv_heads, causal):
    """With the algebraic form and the products' own fractions the error is bounded: compare with exact attention."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, 6, 8), torch.randn(2, kv_heads, 6, 8), torch.randn(2, kv_heads, 6, 8)
    found = logarithmic_attention(q, k, v, is_causal=causal, enable_gqa=True, mantissa=7)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(
        logarithmic_attention(q, k, v, attn_mask=mask, enable_gqa=True),
        logarithmic_attention(q, k, v, is_causal=True, enable_gqa=True),
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
    with pytest.raises(BitwrightError, match="no products"):
        with_logarithmic_products(network, "attention")
    with pytest.raises(UnknownNameError):
        with_logarithmic_products(network, "heads")
    with pytest.raises(InputError, match="not 5"):
        with_logarithmic_products(network, mantissa=5)
    with pytest.raises(InputError, match="multiple"):
        logarithmic_attention(torch.ones(1, 3, 2, 4), torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4))
