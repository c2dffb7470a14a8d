"""Pruning of single weights: masks against sorting by hand, sizes of inputs, a whole model."""

import pytest
import torch
from torch import nn

from bitwright.compression.unstructured_pruning import input_sizes, prune_unstructured, unstructured_mask
from bitwright.core.errors import InputError


def test_magnitude_takes_the_smallest_of_the_matrix():
    torch.manual_seed(0)
    weight = torch.randn(9, 20)
    mask = unstructured_mask(weight, 0.35)
    assert (~mask).sum() == 63
    assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_inputs_weigh_and_every_output_loses_as_much():
    torch.manual_seed(1)
    weight, sizes = torch.randn(9, 20), torch.rand(20) + 0.1
    mask = unstructured_mask(weight, 0.5, sizes)
    assert ((~mask).sum(1) == 10).all()
    for row, kept in zip(weight.abs() * sizes, mask, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_sizes_are_norms_over_tokens():
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 5, 6)
    sizes = input_sizes(model, x, keep=("2",))
    assert list(sizes) == ["0"]
    torch.testing.assert_close(sizes["0"], x.reshape(-1, 6).norm(dim=0))


def test_activations_help_where_inputs_differ():
    """One input is 50 times the others: by magnitude its small weights go, which costs most."""
    torch.manual_seed(3)
    x = torch.randn(200, 32) * torch.where(torch.arange(32) == 5, 50.0, 1.0)
    errors = []
    for weighted in (False, True):
        model = nn.Sequential(nn.Linear(32, 16, bias=False))
        torch.manual_seed(4)
        nn.init.normal_(model[0].weight)
        model[0].weight.data[:, 5] *= 0.1
        expected = model(x).detach()
        prune_unstructured(model, 0.5, input_sizes(model, x) if weighted else None)
        errors.append(float((model(x).detach() - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] / 2


def test_bad_input():
    with pytest.raises(InputError, match="expected 0 to 1"):
        unstructured_mask(torch.ones(3, 3), 1.1)
    with pytest.raises(InputError, match=r"Sizes of inputs are \(3,\)"):
        unstructured_mask(torch.ones(3, 3), 0.5, torch.ones(2))
    with pytest.raises(InputError, match="no linear layers"):
        prune_unstructured(nn.ReLU(), 0.5)
    with pytest.raises(InputError, match="did not reach layer 0"):
        prune_unstructured(nn.Sequential(nn.Linear(2, 2)), 0.5, {})
