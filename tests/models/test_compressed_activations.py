"""Training with activations in few bits: exact outputs, small errors of gradients, bytes kept, and the traps."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models.compressed_activations import (
    TAGS,
    MatMul,
    Packer,
    Ranges,
    Rule,
    Setting,
    compress,
    compressed_activations,
)
from bitwright.models.kept_activations import kept_bytes
from bitwright.models.vision_transformer import Block, VisionTransformer, deit

HEADS = 3


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block(96, HEADS), torch.randn(4, 50, 96), torch.randn(4, 50, 96)


def gradients(model, x, weights, context=None):
    model.zero_grad()
    if context is None:
        (model(x) * weights).sum().backward()
    else:
        with context():
            out = (model(x) * weights).sum()
        out.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def hooked_gradients(model, x, weights, share):
    return gradients(model, x, weights, lambda: compressed_activations(Setting(groups=HEADS, share=share)))


def errors(found, exact):
    return {name: float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("share", [True, False])
def test_outputs_are_exact_and_gradients_within_two_percent(block, share):
    model, x, weights = block
    exact = gradients(model, x, weights)
    compressed = compress(copy.deepcopy(model), Setting(groups=HEADS, share=share))
    assert torch.equal(compressed(x), model(x))
    for found in (gradients(compressed, x, weights), hooked_gradients(model, x, weights, share)):
        relative = errors(found, exact)
        assert 0 < max(value for name, value in relative.items() if exact[name].ndim == 2) < 0.02
        assert max(relative.values()) < 0.04


def test_gradients_are_without_bias(block):
    model, x, weights = block
    exact = gradients(model, x, weights)["mlp.0.weight"].double()
    packer = Packer(Setting(bits=4, groups=HEADS, decay=None))
    one = gradients(model, x, weights, lambda: compressed_activations(packer=packer))["mlp.0.weight"].double()
    draws = [
        gradients(model, x, weights, lambda: compressed_activations(packer=packer))["mlp.0.weight"].double()
        for _ in range(32)
    ]
    mean = sum(draws) / len(draws)
    assert (mean - exact).norm() < 1.5 * (one - exact).norm() / len(draws) ** 0.5


def test_dropout_and_seeds_are_not_disturbed():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 64))
    x = torch.randn(64, 64)
    torch.manual_seed(3)
    plain = model(x)
    torch.manual_seed(3)
    assert torch.equal(compress(copy.deepcopy(model))(x), plain)


def test_every_head_with_its_range_is_better_than_one_range():
    torch.manual_seed(1)
    x = torch.randn(4, 50, 96) * torch.tensor([0.1, 1.0, 8.0]).repeat_interleave(32)
    model, weights = nn.Linear(96, 16), torch.randn(4, 50, 16)
    exact = gradients(model, x, weights)
    heads, whole = (
        errors(gradients(model, x, weights, lambda g=g: compressed_activations(Setting(bits=4, groups=g))), exact)
        for g in (3, 1)
    )
    assert heads["weight"] < whole["weight"]


def test_running_ranges_are_those_of_the_formula_and_stop_outside_training():
    compressed = compress(nn.Sequential(nn.Linear(32, 32)), Setting(groups=4))
    layer = compressed[0]
    rng = np.random.default_rng(0)
    low = span = None
    for _ in range(30):
        x = rng.normal(size=(64, 32)).astype(np.float32) * rng.uniform(0.5, 2)
        compressed(torch.from_numpy(x)).sum().backward()
        grouped = x.reshape(64, 4, 8)
        least, most = grouped.min((0, 2)).astype(np.float64), grouped.max((0, 2)).astype(np.float64)
        low = least if low is None else 0.9 * low + 0.1 * least
        span = most - least if span is None else 0.9 * span + 0.1 * (most - least)
    ranges = layer.kept_activations.packer.ranges
    assert np.allclose(ranges.low[0], low, rtol=1e-5)
    assert np.allclose(ranges.span[0], span, rtol=1e-5)
    before = ranges.low[0].clone()
    compressed.eval()
    compressed(torch.randn(64, 32) * 100)
    assert torch.equal(ranges.low[0], before)
    fresh = compress(nn.Sequential(nn.Linear(32, 32)), Setting(groups=4))
    fresh.load_state_dict(compressed.state_dict())
    assert torch.equal(fresh[0].kept_activations.packer.ranges.low[0], before)


def test_a_module_used_twice_keeps_the_ranges_of_each_use():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    small, large = torch.randn(64, 64), 1000 * torch.randn(64, 64)
    exact = gradients(nn.ModuleList([layer])[0], small, torch.ones(64, 64))
    compressed = compress(nn.Sequential(copy.deepcopy(layer)), Setting(decay=0.0))
    compressed.zero_grad()
    first = compressed(small).sum()
    second = compressed(large)  # changes the running ranges before the first backward pass
    first.backward()
    assert errors({"weight": compressed[0].weight.grad}, {"weight": exact["weight"]})["weight"] < 0.02
    del second


def test_what_is_changed_in_place_after_it_was_kept():
    x = torch.randn(64, 64, requires_grad=True)
    with compressed_activations(Setting()):
        y = x * 1.0
        z = (y * y).sum()
        w = torch.relu_(y.detach().clone()).sum()
    (z + w).backward()
    assert (x.grad - 2 * x.detach()).abs().max() < 0.1
    shared = torch.randn(64, 64)
    with compressed_activations(Setting()):
        a = torch.ones(64, 64, requires_grad=True)
        first = (a * shared).sum()
        shared.add_(5.0)  # another version: it must not be taken for the one kept before
        second = (a * shared).sum()
    (first + second).backward()
    assert (a.grad - (2 * shared - 5)).abs().max() < 0.1


def test_checkpointed_blocks_and_accumulated_gradients(block):
    model, x, weights = block
    exact = gradients(model, x, weights)
    compressed = compress(copy.deepcopy(model), Setting(groups=HEADS))
    compressed.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (checkpoint(compressed, x[half], use_reentrant=False) * weights[half]).sum().backward()
    found = {name: value.grad for name, value in compressed.named_parameters()}
    assert max(errors(found, exact).values()) < 0.04


def test_nan_goes_through_as_without(block):
    model, x, weights = block
    x = x.clone()
    x[0, 0, 0] = float("nan")
    plain = gradients(model, x, weights)
    found = gradients(compress(copy.deepcopy(model), Setting(groups=HEADS)), x, weights)
    assert plain["attention.qkv.weight"].isnan().any()
    assert found["attention.qkv.weight"].isnan().any()


def test_bytes_kept_by_a_vision_transformer():
    torch.manual_seed(0)
    model = VisionTransformer(96, HEADS, depth=2, side=64, patch=8, classes=10)
    x = torch.randn(2, 3, 64, 64)
    plain = kept_bytes(model, lambda: model(x))
    tokens, width, batch = 65, 96, 2
    per_block = (
        tokens * (2 * width + 6 * width + 9 * width) + HEADS * tokens * tokens
    )  # a lower bound: inputs of layers
    assert plain.packed == 0
    assert plain.plain > 4 * batch * 2 * per_block
    separate = kept_bytes(c := compress(copy.deepcopy(model), Setting(groups=HEADS, share=False)), lambda: c(x))
    shared = kept_bytes(d := compress(copy.deepcopy(model), Setting(groups=HEADS)), lambda: d(x))
    four = kept_bytes(e := compress(copy.deepcopy(model), Setting(4, HEADS)), lambda: e(x))
    assert 0.25 < separate.total / plain.total < 0.35
    assert shared.total < 0.92 * separate.total
    assert four.packed < 0.55 * shared.packed


def test_policies_choose_layers(block):
    model, x, weights = block
    exact = gradients(model, x, weights)
    only_fc = [Rule(tag, enable=False) for tag in TAGS if tag != "fc"]
    found = errors(gradients(compress(copy.deepcopy(model), Setting(groups=HEADS), only_fc), x, weights), exact)
    assert found["norm1.weight"] == 0 < found["attention.qkv.weight"]
    policy = [Rule("fc", enable=False), Rule("fc", index=[3], bits=2), *only_fc]
    found = errors(gradients(compress(copy.deepcopy(model), Setting(groups=HEADS), policy), x, weights), exact)
    assert found["mlp.2.weight"] > 0.1
    assert found["attention.qkv.weight"] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: compress(m, policy=[Rule("attention")]), UnknownNameError, "fc"),
        (lambda m: compress(m, policy=[Rule("fc", index=[9])]), InputError, "no number 9"),
        (lambda m: compress(m, Setting(groups=7)), InputError, "divide no linear"),
        (lambda m: compress(compress(m)), InputError, "already"),
        (lambda m: compress(nn.Dropout()), InputError, "no layers"),
        (lambda m: Setting(bits=3), InputError, "not 3"),
        (lambda m: Setting(groups=0), InputError, "at least one"),
        (lambda m: Setting(decay=1.0), InputError, "decay"),
        (lambda m: Setting(rounding="up"), InputError, "nearest"),
        (lambda m: deit("L"), InputError, "Ti, S, B"),
        (lambda m: VisionTransformer(96, 5), InputError, "divide"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(Block(96, HEADS))


def test_products_as_modules_and_empty_ranges():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(MatMul()(a, b), a @ b)
    assert not Ranges().knows(0, 1)
