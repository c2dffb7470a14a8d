"""Linear layers on packed 4-bit weights against dequantised weights."""

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.arithmetic.late_dequantisation import matmul, quantise_tokens, quantise_weights
from bitwright.core.errors import InputError
from bitwright.models.late_dequantised_linear import LateDequantisedLinear, late_dequantised


def layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(200, 30, bias=bias)


@pytest.mark.parametrize("symmetric", [False, True])
def test_float_activations(symmetric):
    linear, x = layer(), torch.randn(2, 5, 200)
    weights = quantise_weights(linear.weight.detach().numpy().T, group=64, symmetric=symmetric)
    expected = x.double() @ torch.from_numpy(weights.dequantise()) + linear.bias
    found = LateDequantisedLinear(linear, 64, symmetric)(x)
    assert found.shape == (2, 5, 30)
    assert (found - expected).abs().max() < 1e-5


def test_int8_activations_bit_for_bit():
    linear, x = layer(bias=False), torch.randn(7, 200)
    weights = quantise_weights(linear.weight.detach().numpy().T, group=128)
    codes, scale = quantise_tokens(x.numpy())
    found = LateDequantisedLinear(linear, activations="int8")(x).numpy()
    assert np.array_equal(found, matmul(codes, weights, scale))


def test_networks_keep_their_heads():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4)

    network = Network()
    twin = late_dequantised(network, 8)
    assert isinstance(twin.body[0], LateDequantisedLinear)
    assert type(twin.lm_head) is type(network.body[0]) is nn.Linear
    with pytest.raises(InputError, match="no linear layers"):
        late_dequantised(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match="int8 or float"):
        LateDequantisedLinear(layer(), activations="int4")
