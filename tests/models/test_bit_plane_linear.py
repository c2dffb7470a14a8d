"""Linear layers on one-bit planes against the same rounded values as ordinary matrices."""

import pytest
import torch
from torch import nn

from bitwright.core.errors import BitwrightError, InputError
from bitwright.models.bit_plane_linear import BitPlaneLinear, bit_plane_execution


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 8), (4, 4), (3, 4), (8, 8)])
@pytest.mark.parametrize("granularity", ["row", "tensor", 48])
@pytest.mark.parametrize("bias", [False, True])
def test_planes_equal_ordinary_products_of_the_same_values(p, q, granularity, bias):
    generator = torch.Generator().manual_seed(p * 8 + q)
    layer = nn.Linear(100, 7, bias=bias)
    x = torch.randn((2, 3, 100), generator=generator)
    x[0, 1] = 0
    planes, values = (BitPlaneLinear.of(layer, p, q, granularity, rounded=rounded) for rounded in (False, True))
    assert torch.equal(planes(x), values(x))
    assert planes(x).shape == (2, 3, 7)


def test_eight_bits_are_close_to_the_layer():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 5), torch.randn(20, 64)
    exact = layer(x)
    error = (BitPlaneLinear.of(layer, 8, 8)(x) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("granularity", ["row", 16, 24])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_bias_is_added_once(granularity, rounded):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 5), torch.randn(20, 64)
    plain = nn.Linear(64, 5, bias=False)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        layer.bias.copy_(torch.tensor([100.0, -50.0, 3.0, 0.0, 1.0]))
    made, without = (BitPlaneLinear.of(each, 4, 8, granularity, rounded=rounded)(x) for each in (layer, plain))
    torch.testing.assert_close(made - without, layer.bias.detach().expand(20, 5), rtol=0, atol=1e-4)


def test_execution_replaces_what_is_not_kept():
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    made = bit_plane_execution(network, 2, 8, keep=("2",))
    assert isinstance(made[0], BitPlaneLinear)
    assert made[2].weight is network[2].weight
    assert isinstance(network[0], nn.Linear)


def test_bad_input():
    network = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match="1 to 8 bits"):
        bit_plane_execution(network, 9, 8)
    with pytest.raises(InputError, match="no linear layers of Sequential"):
        bit_plane_execution(network, 2, 8, keep=("head",))
    with pytest.raises(BitwrightError, match="no linear layers"):
        bit_plane_execution(nn.ReLU(), 2, 8)
    with pytest.raises(InputError, match="int32"):
        BitPlaneLinear.of(nn.Linear(40_000, 1), 8, 8)
    with pytest.raises(InputError, match="Groups of 0"):
        BitPlaneLinear.of(nn.Linear(8, 1), 2, 8, 0)
    with pytest.raises(InputError, match=r"finite|NaN"):
        bit_plane_execution(network, 2, 8)(torch.full((1, 8), float("nan")))
