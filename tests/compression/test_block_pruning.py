"""Pruning in blocks: masks against loops, schedules, a network that is trained and pruned."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitwright.compression.block_pruning import (
    BlockPruning,
    block_mask,
    block_scores,
    cubic_sparsity,
    prune_blocks,
    sparsity_of,
)
from bitwright.core.errors import InputError


def test_scores_are_sums_over_blocks():
    torch.manual_seed(0)
    weight, gradient = torch.randn(10, 7), torch.randn(10, 7)
    for block in ((4, 1), (1, 1), (4, 4), (3, 2)):
        for values, scores in (
            (weight.abs(), block_scores(weight, block)),
            ((weight * gradient).abs(), block_scores(weight, block, gradient)),
        ):  # fmt: skip
            assert scores.shape == (-(-10 // block[0]), -(-7 // block[1]))
            for i in range(scores.shape[0]):
                for j in range(scores.shape[1]):
                    part = values[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
                    torch.testing.assert_close(scores[i, j], part.sum())


def test_masks_drop_the_lowest_blocks():
    scores = torch.tensor([[1.0, 5.0, 1.0], [2.0, 0.5, 9.0]])
    mask = block_mask(scores, (7, 3), (4, 1), 0.5)
    assert mask.shape == (7, 3)
    assert mask[0].tolist() == [False, True, False]  # 0.5 and both 1.0 go
    assert mask[4].tolist() == [True, False, True]
    assert (mask[:4] == mask[0]).all()
    assert (mask[4:] == mask[4]).all()


def test_schedule():
    assert [cubic_sparsity(step, 10, 20, 0.8) for step in (0, 10, 20, 99)] == [0, 0, 0.8, 0.8]
    assert cubic_sparsity(15, 10, 20, 0.8) == pytest.approx(0.8 - 0.8 * 0.5**3)
    steps = [cubic_sparsity(step, 0, 50, 0.9, 0.2) for step in range(51)]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(0.2)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small products: threads only wait for each other
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("score", ["magnitude", "gradient"])
def test_a_network_is_pruned_while_it_is_trained(score):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(512, 20)
    y = (x[:, :8].reshape(512, 4, 2).sum(-1)).argmax(-1)
    pruning = BlockPruning(model, (4, 1), 0.75, first=20, last=120, every=5, score=score, keep=("4",))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    shares = []
    for _ in range(250):
        optimiser.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        shares.append(pruning.step())
    assert shares[0] == 0
    assert shares[-1] == 0.75
    for at in (0, 2):
        blocks = model[at].weight.view(-1, 4, model[at].in_features).abs().sum(1)
        assert (blocks == 0).double().mean() == pytest.approx(0.75, abs=0.01)
        assert ((model[at].weight.view(-1, 4, model[at].in_features) == 0).any(1) == (blocks == 0)).all()
    assert (model[4].weight != 0).all()
    assert (model(x).argmax(-1) == y).double().mean() > 0.9


def test_at_once():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    before = model[0].weight.clone()
    prune_blocks(model, sparsity=0.5, keep=("2",))
    assert sparsity_of(model, ("2",)) == 0.5
    kept = model[0].weight != 0
    assert torch.equal(model[0].weight[kept], before[kept])
    scores = block_scores(before)
    assert scores[kept[::4]].min() >= scores[~kept[::4]].max()


def test_bad_input():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match="share from 0 to 1"):
        prune_blocks(model, sparsity=1.2)
    with pytest.raises(InputError, match="no linear layers"):
        prune_blocks(nn.ReLU())
    with pytest.raises(InputError, match="no linear layers"):
        prune_blocks(model, keep=("0",))
    with pytest.raises(InputError, match="expected a matrix"):
        block_scores(torch.ones(3), (4, 1))
    with pytest.raises(InputError, match="magnitude or gradient"):
        BlockPruning(model, score="random")
    with pytest.raises(InputError, match="expected to grow"):
        BlockPruning(model, first=5, last=5)
    pruning = BlockPruning(model, score="gradient")
    with pytest.raises(InputError, match="no gradient"):
        pruning.step()
