"""The int8 encoder on block-sparse products against the float encoder with the same weights."""

import pytest
import torch
from torch.nn import functional

from bitwright.core.errors import InputError
from bitwright.models.block_sparse_encoder import BlockSparseEncoder, row_stride
from bitwright.models.encoder import Encoder, EncoderConfig

CONFIG = EncoderConfig(vocabulary=50, hidden=48, layers=3, heads=4, feed_forward=96, max_positions=128)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = Encoder(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape) * 0.15)
    for layer in model.layers:  # half of the (4, 1) blocks go
        for linear in (layer.query, layer.key, layer.value, layer.output, layer.up, layer.down):
            rows = linear.weight.view(-1, 4, linear.in_features)
            rows *= (torch.rand(len(rows), 1, linear.in_features) < 0.5).float()
    return model


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (len(lengths), max(lengths)), generator=generator)
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def cosines(found, expected, mask):
    return functional.cosine_similarity(found[mask], expected[mask], dim=-1)


@pytest.mark.parametrize("group", [1, 60, 512])
def test_states_are_those_of_the_encoder(encoder, group):
    sparse = BlockSparseEncoder.from_encoder(encoder, *batch([90, 70, 100, 33], 1), group_tokens=group)
    assert sparse.density == pytest.approx(0.5, abs=0.02)
    ids, mask = batch([5, 1, 70, 128, 64, 63])
    found, expected = sparse(ids, mask), encoder(ids, mask)
    assert found.shape == expected.shape
    assert (found[~mask] == 0).all()
    assert cosines(found, expected, mask).min() > 0.97
    assert cosines(found, expected, mask).mean() > 0.995


def test_sentences_do_not_see_each_other(encoder):
    sparse = BlockSparseEncoder.from_encoder(encoder, *batch([90, 70], 1))
    ids, mask = batch([20, 37, 11])
    together = sparse(ids, mask)
    for at, length in enumerate((20, 37, 11)):
        alone = sparse(ids[at : at + 1, :length])
        torch.testing.assert_close(together[at, :length], alone[0])


def test_stored_bytes(encoder):
    sparse = BlockSparseEncoder.from_encoder(encoder, *batch([90], 1))
    weights = 3 * (4 * 48 * 48 + 2 * 48 * 96)
    assert weights * 0.5 * 1.5 < sparse.weight_bytes < weights * 0.5 * 1.9  # 1.5 bytes a weight, filling, row starts


def test_row_stride_is_an_odd_number_of_lines():
    assert [row_stride(tokens) for tokens in (1, 64, 65, 128, 129, 192, 193)] == [64, 64, 192, 192, 192, 192, 320]


def test_bad_input(encoder):
    ids, mask = batch([9])
    with pytest.raises(InputError, match="no scale"):
        BlockSparseEncoder.from_encoder(encoder, ids, mask[:, :4])
    with pytest.raises(InputError, match="no scale"):
        BlockSparseEncoder.from_encoder(encoder, ids, torch.zeros_like(mask))
    torch.manual_seed(1)
    scattered = Encoder(CONFIG).eval().requires_grad_(False)
    for layer in scattered.layers:
        layer.up.weight *= (torch.rand_like(layer.up.weight) < 0.1).float()
    with pytest.raises(InputError, match="not pruned in these blocks"):
        BlockSparseEncoder.from_encoder(scattered, ids, mask)
    odd = Encoder(EncoderConfig(vocabulary=50, hidden=42, layers=1, heads=7, feed_forward=8))
    with pytest.raises(InputError, match="multiples of 4 channels"):
        BlockSparseEncoder.from_encoder(odd, ids, mask)
    broken = Encoder(CONFIG).eval().requires_grad_(False)
    broken.layers[0].up.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"not finite|NaN"):
        BlockSparseEncoder.from_encoder(broken, ids, mask)
