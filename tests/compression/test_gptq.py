"""GPTQ of one layer, against an independent elimination with an explicit inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compression.gptq import Hessian, quantise, round_to_nearest
from bitwright.core.errors import BitwrightError, InputError


def layer(rows, columns, seed=0, correlated=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    if correlated:
        inputs = inputs @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    return weight, 2 * inputs.T @ inputs / len(inputs), inputs


def reference(weight, hessian, bits, group, order, damping=0.01):
    """Optimal brain surgery in a given order: round one column, correct the rest through the explicit inverse of the
    remaining part of the Hessian, which Gaussian elimination then shrinks. Values (rows, columns), numpy float64."""
    w, h = weight.numpy().copy()[:, order], hessian.numpy().copy()[np.ix_(order, order)]
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    inverse = np.linalg.inv(h)
    most, values = 2**bits - 1, np.empty_like(w)
    for i in range(len(h)):
        if i % group == 0:
            part = w[:, i : i + group]
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / most
            zero = np.rint(-low / scale)
        values[:, i] = scale * (np.clip(np.rint(w[:, i] / scale) + zero, 0, most) - zero)
        error = (w[:, i] - values[:, i]) / inverse[0, 0]
        w[:, i:] -= np.outer(error, inverse[0])
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    back = np.empty_like(values)
    back[:, order] = values
    return back


@settings(deadline=None, max_examples=25)
@given(
    columns=st.sampled_from([8, 24, 64]), bits=st.integers(2, 8), groups=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([1, 5, 32, 128]), seed=st.integers(0, 99), act_order=st.booleans(),
)  # fmt: skip
def test_codes_are_those_of_elimination_for_every_block(columns, bits, groups, block, seed, act_order):
    weight, hessian, _ = layer(7, columns, seed)
    group = columns // groups
    found = quantise(weight, hessian, bits, group, act_order=act_order, block=block)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if act_order else np.arange(columns)
    expected = reference(weight, hessian, bits, group, order)
    assert np.abs(found.dequantise().numpy() - expected).max() < 1e-5 * np.abs(expected).max()


OPTIONS = [
    {}, {"symmetric": True}, {"group": 16}, {"act_order": True, "group": 8}, {"search": True},
    {"static_groups": True, "group": 16, "act_order": True},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_is_that_of_the_damped_hessian(options):
    weight, hessian, _ = layer(9, 64, 3)
    found = quantise(weight, hessian, 3, damping=0.02, **options)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(64)
    difference = found.dequantise().double() - weight
    assert found.loss == pytest.approx(float((difference @ damped * difference).sum()) / 2, rel=1e-5)
    assert int(found.codes.max()) <= 7


@pytest.mark.parametrize("bits", [3, 4])
def test_at_most_half_the_error_of_rounding_to_nearest(bits):
    weight, hessian, inputs = layer(64, 128, 1)
    exact = inputs @ weight.T

    def error(quantised):
        return float(((inputs @ quantised.dequantise().double().T - exact) ** 2).mean())

    plain = error(round_to_nearest(weight, bits, 64))
    assert error(quantise(weight, hessian, bits, 64)) < 0.5 * plain
    assert error(quantise(weight, hessian, bits, 64, act_order=True, static_groups=True)) < 0.5 * plain


def test_rounding_to_nearest_without_compensation():
    weight, _, _ = layer(5, 32)
    found = round_to_nearest(weight, 4, 8)
    part = weight.view(5, 4, 8).numpy()
    low, high = np.minimum(part.min(2), 0), np.maximum(part.max(2), 0)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    expected = scale[..., None] * (np.clip(np.rint(part / scale[..., None]) + zero[..., None], 0, 15) - zero[..., None])
    assert np.allclose(found.dequantise().numpy(), expected.reshape(5, 32), atol=1e-6)
    searched = round_to_nearest(weight, 2, 8, search=True).dequantise()
    plain = round_to_nearest(weight, 2, 8).dequantise()
    assert (searched - weight).abs().pow(2.4).sum() < (plain - weight).abs().pow(2.4).sum()


def test_dead_inputs_and_empty_rows():
    weight, hessian, _ = layer(4, 16)
    hessian[5, :] = hessian[:, 5] = 0
    weight[2] = 0
    found = quantise(weight, hessian, 4)
    assert found.dead == 1
    assert (found.dequantise()[:, 5] == 0).all()
    assert (found.dequantise()[2] == 0).all()
    assert (found.scale[2] > 0).all()


def test_the_hessian_is_that_of_all_inputs_in_any_pieces():
    inputs = torch.randn(6, 10, 12)
    whole, pieces = Hessian(12), Hessian(12)
    whole.add(inputs)
    for part in inputs.split([1, 3, 2]):
        pieces.add(part)
    expected = 2 * torch.einsum("bti,btj->ij", inputs.double(), inputs.double()) / 6
    assert (whole.matrix - expected).abs().max() < 1e-4
    assert (pieces.matrix - expected).abs().max() < 1e-4


def test_damping_is_raised_until_there_is_a_factor():
    weight, _, _ = layer(3, 8)
    singular = torch.ones(8, 8, dtype=torch.float64)
    assert quantise(weight, singular, 4, damping=0.0).damping > 0
    with pytest.raises(BitwrightError, match="no Cholesky factor"):
        quantise(weight, -torch.eye(8, dtype=torch.float64), 4)


def test_packed_kernels_take_contiguous_groups():
    weight, hessian, _ = layer(6, 32)
    found = quantise(weight, hessian, 4, 8, act_order=True, static_groups=True)
    grouped = found.grouped()
    assert np.allclose(grouped.dequantise().T, found.dequantise().numpy(), atol=1e-6)
    scattered = quantise(weight, hessian, 4, 8, act_order=True)
    with pytest.raises(InputError, match="static_groups"):
        scattered.grouped()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, h: quantise(w, h[:3, :3]), "do not fit"),
        (lambda w, h: quantise(w, h, 9), "2 to 8"),
        (lambda w, h: quantise(w, h, 4, 5), "do not divide"),
        (lambda w, h: quantise(w * float("nan"), h), "NaN"),
        (lambda w, h: quantise(w, h * float("inf")), "NaN or infinity"),
        (lambda w, h: quantise(w[:0], h), "do not fit"),
        (lambda w, h: quantise(w, h, damping=-1), "damping"),
        (lambda w, h: Hessian(4).add(torch.zeros(2, 5)), "4 columns"),
        (lambda w, h: Hessian(4).add(torch.full((2, 4), float("nan"))), "NaN"),
    ],
)
def test_bad_input(call, message):
    weight, hessian, _ = layer(4, 16)
    with pytest.raises(InputError, match=message):
        call(weight, hessian)
