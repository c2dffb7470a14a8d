"""Captured operands are the integers that the layers really multiplied."""

import numpy as np
import pytest
import torch
from tiny_decoder import TINY

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models.decoder import Decoder
from bitwright.models.integer import IntegerLinear, integer_execution
from bitwright.models.operands import collect_operands, linear_layers, value_histogram

IDS = torch.randint(0, TINY.vocabulary, (2, 15), generator=torch.Generator().manual_seed(0))


def test_full_operands_reproduce_the_outputs(tiny: Decoder) -> None:
    model = integer_execution(tiny)
    outputs: dict[str, torch.Tensor] = {}
    scales: dict[str, torch.Tensor] = {}
    hooks = []
    for name, layer in linear_layers(model).items():

        def keep(module: IntegerLinear, arguments, output, name=name) -> None:
            outputs[name] = output.reshape(-1, module.out_features)
            rows = arguments[0].reshape(-1, module.in_features)
            scales[name] = rows.abs().amax(1, keepdim=True) / 127

        hooks.append(layer.register_forward_hook(keep))
    found = collect_operands(model, IDS, rows=1000, columns=1000)
    assert [each.name for each in found] == list(linear_layers(model))
    assert len(found) == 7 * TINY.layers + 1
    for each in found:
        layer = linear_layers(model)[each.name]
        assert each.activations.dtype == each.weights.dtype == np.int8
        assert (each.m, each.k) == each.activations.shape
        assert (each.k, each.n) == each.weights.shape
        product = torch.from_numpy(each.activations.astype(np.int64) @ each.weights.astype(np.int64))
        again = product * scales[each.name] * layer.weight_scale
        torch.testing.assert_close(again, outputs[each.name], rtol=1e-5, atol=1e-6)
        values = np.arange(-128, 128)
        for codes, histogram in ((each.activations, each.activation_histogram), (each.weights, each.weight_histogram)):
            assert histogram.sum() == codes.size
            assert np.array_equal(histogram, [(codes == value).sum() for value in values])
    assert not any(layer._forward_pre_hooks for layer in linear_layers(model).values())


def test_samples_are_seeded_parts_of_the_whole(tiny: Decoder) -> None:
    model = integer_execution(tiny)
    name = "layers.1.feed_forward.down"
    (whole,) = collect_operands(model, IDS, [name], rows=1000, columns=1000)
    (part,) = collect_operands(model, IDS, [name], rows=4, columns=5, seed=1)
    (again,) = collect_operands(model, IDS, [name], rows=4, columns=5, seed=1)
    (other,) = collect_operands(model, IDS, [name], rows=4, columns=5, seed=2)
    assert part.activations.shape == (4, 80)
    assert part.weights.shape == (80, 5)
    assert (part.m, part.k, part.n) == (30, 80, 48)
    assert np.array_equal(part.activations, again.activations)
    assert np.array_equal(part.weights, again.weights)
    assert not np.array_equal(part.activations, other.activations)
    assert {row.tobytes() for row in part.activations} <= {row.tobytes() for row in whole.activations}
    assert {column.tobytes() for column in part.weights.T} <= {column.tobytes() for column in whole.weights.T}
    assert np.array_equal(part.activation_histogram, whole.activation_histogram)


def test_a_layer_used_twice_counts_twice() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 6)
    model = integer_execution(torch.nn.Sequential(linear, torch.nn.ReLU(), linear))
    model[2] = model[0]
    (found,) = collect_operands(model, torch.randn(9, 6), rows=100)
    assert found.m == 18
    assert found.activations.shape == (9, 6)
    assert found.activation_histogram.sum() == 18 * 6


def test_bad_requests_are_refused(tiny: Decoder) -> None:
    model = integer_execution(tiny)
    with pytest.raises(UnknownNameError, match="lm_head"):
        collect_operands(model, IDS, ["lm_haed"])
    with pytest.raises(InputError, match="integer_execution"):
        collect_operands(tiny, IDS)
    with pytest.raises(InputError, match="0 rows"):
        collect_operands(model, IDS, rows=0)
    with pytest.raises(InputError, match="int8"):
        value_histogram(torch.zeros(3))
