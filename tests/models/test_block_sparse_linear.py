"""Linear layers on block-sparse products in any network: values, gradients, torch.export."""

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.compression.block_pruning import prune_blocks
from bitwright.core.errors import InputError
from bitwright.models.block_sparse_linear import BlockSparseLinear, block_sparse_linear, on_block_sparse_products


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 66), nn.GELU(), nn.Linear(66, 32, bias=False)).eval()
    prune_blocks(model, sparsity=0.6)
    return model


def test_values_are_those_of_the_codes(network):
    x = torch.randn(3, 7, 40)
    layer = BlockSparseLinear(network[0], float(x.min()), float(x.max()))
    codes = np.clip(np.rint(x.numpy() / layer.rounding.scale) + layer.rounding.zero_point, 0, 255)
    weight = network[0].weight.detach().numpy()
    own = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-8) / 127
    expected = (codes - layer.rounding.zero_point) @ np.rint(weight / own).T * (own[:, 0] * layer.rounding.scale)
    np.testing.assert_allclose(layer(x).numpy(), expected + network[0].bias.detach().numpy(), atol=1e-5)
    assert layer.density == pytest.approx(0.4, abs=0.02)


def test_a_network_keeps_its_results(network):
    x = torch.randn(64, 40)
    twin = on_block_sparse_products(network, x)
    assert isinstance(twin[0], BlockSparseLinear)
    assert isinstance(network[0], nn.Linear)
    expected = network(x).detach()
    assert (twin(x) - expected).norm() < 0.02 * expected.norm()
    assert isinstance(on_block_sparse_products(network, x, keep=("0",))[0], nn.Linear)


def test_gradients_pass_to_the_inputs(network):
    x = torch.randn(5, 40, requires_grad=True)
    layer = BlockSparseLinear(network[0], -4, 4)
    layer(x).sum().backward()
    expected = network[0].weight.detach().sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad, expected, atol=0.05, rtol=0.05)


def test_it_can_be_exported(network):
    x = torch.randn(6, 40)
    twin = on_block_sparse_products(network, x).eval()
    program = torch.export.export(twin, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    more = torch.randn(11, 40)
    assert torch.equal(program.module()(more), twin(more))
    layer = twin[0]
    buffers = [getattr(layer, name) for name in ("start", "index", "value", "sums", "scale", "bias")]
    torch.library.opcheck(block_sparse_linear, (x, *buffers, layer.rounding.scale, layer.rounding.zero_point))


def test_bad_input(network):
    with pytest.raises(InputError, match="no linear layers"):
        on_block_sparse_products(nn.GELU(), torch.ones(1))
    with pytest.raises(InputError, match="not finite numbers in order"):
        BlockSparseLinear(network[0], 0.0, float("nan"))
    with pytest.raises(InputError, match="not finite numbers in order"):
        BlockSparseLinear(network[0], 2.0, 1.0)

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(InputError, match=r"does not reach layer unused"):
        on_block_sparse_products(Unused(), torch.ones(1, 8))
