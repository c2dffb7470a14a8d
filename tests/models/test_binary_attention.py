"""Binary attention by the mean and by hashing, against independent references and hand-written gradients."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models.binary_attention import (
    RELEASED_SPARSE_ABOVE,
    BinaryLinearAttention,
    HashSettings,
    KernelHash,
    binarise,
)

SMALL = HashSettings(bits=6, supports=7, iterations=30, neighbours=3)


def tokens(images=4, heads=3, count=10, size=5, seed=0):
    """Normalised tokens in clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn((1, heads, 4, size), generator=generator)
    x = centres[:, :, torch.randint(0, 4, (count,), generator=generator)] + 0.3 * torch.randn(
        (images, heads, count, size), generator=generator
    )
    return functional.normalize(x, dim=-1)


def reference_kernel(x, supports):
    """One image and head, numpy float64: (tokens, supports)."""
    distances = ((x[:, None] - supports[None]) ** 2).sum(-1)
    return np.exp(-distances / (2 * distances.mean()))


def reference_fit(x, drawn, supports, settings):
    """Bits one after the other by hand-written gradients, numpy float64: projections (heads, bits, supports)."""
    images, heads, count, _ = x.shape
    kernel = np.array([[reference_kernel(x[b, h], supports[h]) for h in range(heads)] for b in range(images)])
    kernel = kernel - kernel.mean((0, 2), keepdims=True)
    rest = np.zeros((images, heads, count, count))
    for b in range(images):
        for h in range(heads):
            order = np.argsort(x[b, h] @ x[b, h].T, axis=1)
            for row in range(count):
                rest[b, h, row, order[row, -settings.neighbours :]] = settings.bits
                rest[b, h, row, order[row, : settings.neighbours]] = -settings.bits
    found = drawn.copy()
    scale = images * heads * count * settings.bits
    for bit in range(settings.bits):
        a, speed = drawn[:, bit].copy(), np.zeros_like(drawn[:, bit])
        for _ in range(settings.iterations):
            y = np.tanh(np.einsum("bhnm,hm->bhn", kernel, a) / 2)
            of_y = -np.einsum("bhnl,bhl->bhn", rest + rest.transpose(0, 1, 3, 2), y) / scale
            gradient = np.einsum("bhn,bhnm->hm", of_y * (1 - y * y) / 2, kernel)
            speed = 0.9 * speed + gradient
            a = a - 5e-4 * (gradient + 0.9 * speed)
        signs = [np.where(np.einsum("bhnm,hm->bhn", kernel, each) > 0, 1.0, -1.0) for each in (drawn[:, bit], a)]
        before, after = (-np.einsum("bhn,bhnl,bhl->", y, rest, y) for y in signs)
        if after < before:
            found[:, bit] = a
        chosen = signs[int(after < before)]
        rest = rest - chosen[..., :, None] * chosen[..., None, :]
    return found


def test_fit_of_a_hash():
    x = tokens()
    made = KernelHash(3, 5, SMALL)
    made.fit(x, seed=3)
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randperm(40, generator=generator)[:7]
    supports = torch.stack([x[:, head].reshape(-1, 5)[chosen] for head in range(3)])
    assert torch.equal(made.supports, supports)
    drawn = torch.randn((3, 6, 7), generator=generator)
    # steps of 5e-4 hardly move a drawn bit: compare how far, not only where
    expected = reference_fit(*(each.double().numpy() for each in (x, drawn, supports)), SMALL)
    moved, wanted = made.projection - drawn, torch.from_numpy(expected).float() - drawn
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(moved, wanted, atol=2e-6)
    again = KernelHash(3, 5, SMALL)
    again.fit(x, seed=3)
    assert torch.equal(again.projection, made.projection)
    again.fit(x, seed=4)
    assert not torch.equal(again.projection, made.projection)


def test_codes_of_a_hash():
    x = tokens()
    made = KernelHash(3, 5, SMALL)
    made.fit(x)
    codes = made(x)
    assert codes.shape == (4, 3, 10, 6)
    assert set(codes.unique().tolist()) == {0.0, 1.0}
    for image in range(4):
        for head in range(3):
            supports = made.supports[head].double().numpy()
            kernel = reference_kernel(x[image, head].double().numpy(), supports) - made.centre[head].double().numpy()
            projected = kernel @ made.projection[head].double().numpy().T
            sure = np.abs(projected) > 1e-5
            assert sure.mean() > 0.99
            assert np.array_equal((codes[image, head].numpy() == 1)[sure], (projected > 0)[sure])
    assert torch.equal(made(x[1:2]), codes[1:2])  # the width of the kernel is an image's own


def test_more_alike_tokens_share_more_bits():
    x = tokens(images=6, count=24)
    settings = HashSettings(bits=16, supports=25, iterations=100, neighbours=6)
    made = KernelHash(3, 5, settings)
    made.fit(x)
    codes = made(x)
    shared = (codes[..., :, None, :] == codes[..., None, :, :]).double().mean(-1)
    order = (x @ x.transpose(2, 3)).argsort(-1)
    near, far = shared.gather(3, order[..., -7:-1]).mean(), shared.gather(3, order[..., :6]).mean()
    assert near > far + 0.2


def test_gradient_of_codes():
    x = tokens(images=2).requires_grad_(True)
    made = KernelHash(3, 5, SMALL)
    made.fit(x)
    g = torch.randn(2, 3, 10, 6, generator=torch.Generator().manual_seed(1))
    made(x).backward(g)
    # by hand, float64: y = a . (exp(-d / 2w) - c), gradient of the codes where 0 < y < 1
    for image in range(2):
        for head in range(3):
            tokens_, supports = x[image, head].detach().double().numpy(), made.supports[head].double().numpy()
            difference = tokens_[:, None] - supports[None]
            distances = (difference**2).sum(-1)
            width = distances.mean()
            kernel = np.exp(-distances / (2 * width))
            projection = made.projection[head].double().numpy()
            y = (kernel - made.centre[head].double().numpy()) @ projection.T
            of_kernel = (g[image, head].double().numpy() * ((y > 0) & (y < 1))) @ projection
            of_distance = -of_kernel * kernel / (2 * width)
            of_width = (of_kernel * kernel * distances).sum() / (2 * width**2)
            of_distance = of_distance + of_width / distances.size
            expected = (of_distance[..., None] * 2 * difference).sum(1)
            assert np.abs(x.grad[image, head].numpy() - expected).max() < 1e-4
            assert np.abs(expected).max() > 1e-2


def hashed(width=12, heads=3, seed=0, **options):
    torch.manual_seed(seed)
    made = BinaryLinearAttention(width, heads, quantiser="hash", hashing=SMALL, **options)
    x = torch.randn(2, 70, width)
    made.fit_hash(x)
    return made, x


def split(made, heads=3):
    return made.reshape(*made.shape[:2], heads, -1).transpose(1, 2)


def test_hashed_attention_in_the_quadratic_order():
    layer, x = hashed()
    codes = layer.hash(functional.normalize(split(layer.query(x)), dim=-1))
    value = split(layer.value(x))
    mixed = 0.5 * value + ((codes @ codes.transpose(2, 3)) @ value) / math.pi
    expected = functional.normalize(mixed, dim=-1) + layer.neighbours(value)
    assert torch.allclose(layer(x), layer.output(expected.transpose(1, 2).reshape(x.shape)), atol=1e-5)
    assert "key.weight" not in layer.state_dict()
    layer(x).square().sum().backward()
    assert layer.query.weight.grad.abs().max() > 0
    twin = BinaryLinearAttention(12, 3, quantiser="hash", hashing=SMALL)
    twin.load_state_dict(layer.state_dict())  # the fit is part of the state
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("quantiser", ["mean", "hash"])
def test_native_attention_equals_the_float_one(quantiser):
    if quantiser == "hash":
        attention, x = hashed()
    else:
        torch.manual_seed(0)
        attention, x = BinaryLinearAttention(12, 3), torch.randn(2, 70, 12)
    attention.eval()
    native = copy.deepcopy(attention)
    native.native = True
    assert torch.allclose(native(x), attention(x), atol=1e-5)
    with torch.no_grad():  # values of whole numbers: the sums are exact
        for each in (attention, native):
            each.value.weight.copy_(torch.randint(-9, 9, (12, 12), generator=torch.Generator().manual_seed(2)))
            each.value.bias.zero_()
    assert torch.allclose(native(x.round()), attention(x.round()), atol=1e-6)


def test_attention_in_both_orders():
    torch.manual_seed(0)
    layer, x = BinaryLinearAttention(12, 3), torch.randn(2, 7, 12)
    q, k, v = binarise(split(layer.query(x))), binarise(split(layer.key(x))), split(layer.value(x))
    mixed = 0.5 * v + ((q @ k.transpose(2, 3)) @ v) / math.pi
    expected = functional.normalize(mixed, dim=-1) + layer.neighbours(v)
    assert torch.allclose(layer(x), layer.output(expected.transpose(1, 2).reshape(2, 7, 12)), atol=1e-5)
    assert torch.isfinite(layer(torch.zeros(1, 3, 12))).all()


def test_gradient_of_binarise():
    torch.manual_seed(0)
    value = torch.randn(4, 6, requires_grad=True)
    binarise(value).backward(torch.ones(4, 6))
    twin = value.detach().clone().requires_grad_(True)
    functional.normalize(twin, dim=-1).clamp(0, 1).backward(torch.ones(4, 6))
    assert torch.allclose(value.grad, twin.grad, atol=1e-6)


def test_codes_of_zeros_have_a_defined_result():
    layer = BinaryLinearAttention(8, 2)
    with torch.no_grad():
        layer.query.weight.zero_(), layer.query.bias.zero_()  # nothing exceeds the mean
    x = torch.randn(1, 5, 8)
    value = split(layer.value(x), 2)
    expected = functional.normalize(0.5 * value, dim=-1) + layer.neighbours(value)
    for native in (False, True):
        layer.native = native
        assert torch.allclose(layer(x), layer.output(expected.transpose(1, 2).reshape(1, 5, 8)), atol=1e-6)


def test_tokens_that_are_all_alike_have_codes():
    made = KernelHash(1, 4, HashSettings(bits=3, supports=2, iterations=2, neighbours=1))
    same = torch.full((1, 1, 4, 4), 0.5)
    made.fit(same)
    assert torch.isfinite(made(same)).all()


@pytest.mark.parametrize("quantiser", ["mean", "hash"])
def test_sparse_branch_in_training_only(quantiser):
    torch.manual_seed(0)
    layer = BinaryLinearAttention(12, 3, 9, quantiser, hashing=SMALL, sparse_above=0.06)
    x = torch.randn(2, 20, 12)
    if quantiser == "hash":
        layer.fit_hash(x)
    query, value = split(layer.query(x)), split(layer.value(x))
    key = query if quantiser == "hash" else split(layer.key(x))
    if quantiser == "hash":
        codes = layer.hash(functional.normalize(query, dim=-1)), layer.hash(functional.normalize(key, dim=-1))
    else:
        codes = binarise(query), binarise(key)
    scores = np.exp((query @ key.transpose(2, 3)).detach().double().numpy() / 2)  # size 4 per head
    weights = scores / scores.sum(-1, keepdims=True)
    assert 0.01 < (weights > 0.06).mean() < 0.5
    kept = torch.from_numpy(np.where(weights > 0.06, weights, 0.0)).float()
    base = 0.5 * value + codes[0] @ (codes[1].transpose(2, 3) @ value) / math.pi
    for training in (True, False):
        layer.train(training)
        mixed = base + kept @ value if training else base
        expected = functional.normalize(mixed, dim=-1) + layer.neighbours(value)
        assert torch.allclose(layer(x), layer.output(expected.transpose(1, 2).reshape(x.shape)), atol=1e-5)
    assert RELEASED_SPARSE_ABOVE == 0.02


def unfitted():
    return BinaryLinearAttention(12, 3, quantiser="hash", hashing=SMALL)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: BinaryLinearAttention(10, 3), InputError, "3 heads"),
        (lambda: BinaryLinearAttention(9, 3, 4), InputError, "kernel of 4"),
        (lambda: BinaryLinearAttention(9, 0), InputError, "0 heads"),
        (lambda: BinaryLinearAttention(9, 3, quantiser="median"), UnknownNameError, "median"),
        (lambda: BinaryLinearAttention(9, 3, sparse_above=1.0), InputError, "threshold"),
        (lambda: BinaryLinearAttention(9, 3, sparse_above=math.nan), InputError, "threshold"),
        (lambda: HashSettings(bits=0), InputError, "1 or more"),
        (lambda: unfitted()(torch.zeros(1, 9, 12)), InputError, "not fitted"),
        (lambda: unfitted().fit_hash(torch.zeros(4, 9, 10)), InputError, "tokens, 12"),
        (lambda: unfitted().fit_hash(torch.zeros(9, 12)), InputError, "tokens, 12"),
        (lambda: unfitted().fit_hash(torch.zeros(4, 5, 12)), InputError, "too few samples"),
        (lambda: unfitted().fit_hash(torch.zeros(1, 6, 12)), InputError, "too few samples"),
        (lambda: unfitted().fit_hash(torch.full((2, 9, 12), math.nan)), InputError, "not finite"),
        (lambda: BinaryLinearAttention(12, 3).fit_hash(torch.zeros(4, 9, 12)), InputError, "around the mean"),
        (lambda: KernelHash(3, 4, SMALL).fit(torch.zeros(2, 3, 9, 5)), InputError, "3 heads"),
        (lambda: KernelHash(3, 4, SMALL).fit(torch.zeros(2, 2, 9, 4)), InputError, "3 heads"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_layer_is_a_module_of_few_parts():
    names = {name for name, _ in BinaryLinearAttention(8, 2).named_children()}
    assert names == {"query", "key", "value", "output", "neighbours"}
    assert isinstance(hashed()[0].query, nn.Linear)
