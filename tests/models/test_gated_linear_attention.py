"""Networks of gated linear attention: calls that carry states on, gates, and a task that they learn."""

import math

import pytest
import torch
from torch.nn import functional

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.gated_linear_attention_forms import recurrent
from bitwright.models.gated_linear_attention import GATES, GatedLinearAttention, GLAConfig, GLATransformer, recall_batch


def network(gates="channel", **sizes):
    torch.manual_seed(0)
    given = {"vocabulary": 40, "hidden": 32, "layers": 2, "heads": 2, "feed_forward": 48, "gates": gates, **sizes}
    return GLATransformer(GLAConfig(**given))


@pytest.mark.parametrize("gates", GATES)
def test_steps_equal_one_pass(gates):
    model = network(gates)
    ids = torch.randint(0, 40, (2, 75))
    whole, last = model(ids)
    logits, states = model(ids[:, :70])
    parts = [logits]
    for t in range(70, 75):
        logits, states = model(ids[:, t : t + 1], states)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(states, last, strict=True))
    assert sum(state[0].numel() * 4 for state in last) == model.config.state_bytes


def test_layer_against_its_definition():
    torch.manual_seed(0)
    layer = GatedLinearAttention(GLAConfig(40, 32, 1, 2))
    x = torch.randn(2, 20, 32)
    q, k = (made(x).view(2, 20, 2, 8) for made in (layer.query, layer.key))
    gates = torch.sigmoid(x @ layer.gate[0].weight.T @ layer.gate[1].weight.T + layer.gate[1].bias) ** (1 / 16)
    mixed, _ = recurrent(q, k, layer.value(x).view(2, 20, 2, 16), gates.log().view(2, 20, 2, 8), 8**-0.5)
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gated = functional.silu(layer.output_gate(x)) * normed.reshape(2, 20, 32)
    assert torch.allclose(layer(x)[0], gated @ layer.output.weight.T, atol=1e-5)


def test_kinds_of_gates():
    x = torch.randn(2, 5, 32)
    for gates in GATES:
        found = network(gates).attention[0].log_gates(x)
        assert found.shape == (2, 5, 2, 8)
        assert (found <= 0).all()
    assert torch.allclose(
        network("fixed").attention[0].log_gates(x)[0, 0, :, 0].exp(), torch.tensor([31 / 32, 63 / 64])
    )
    scalar = network("scalar").attention[0].log_gates(x)
    assert (scalar == scalar[..., :1]).all()
    assert (network("none").attention[0].log_gates(x) == 0).all()


@pytest.fixture
def one_thread():
    """Layers this small only wait for each other's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_learns_to_alternate():
    tokens = 12
    model = network(vocabulary=tokens)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(240):
        pair = torch.randint(0, tokens, (8, 2), generator=generator)  # a b a b ...: what is next is two tokens back
        ids = pair.repeat(1, 9)
        logits = model(ids[:, :-1])[0][:, 2:]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten())
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    chance = math.log(tokens)
    assert losses[0] > chance
    assert sum(losses[-20:]) / 20 < 0.5 * chance


def test_recall_batches():
    ids, targets = recall_batch(16, 4, 32, torch.Generator().manual_seed(0))
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        asked = [(token, target) for token, target in zip(row, wanted, strict=True) if target >= 0]
        assert sorted(pairs.items()) == sorted(asked)
        assert sum(token == 128 for token in row) == 32 - 12
    with pytest.raises(InputError):
        recall_batch(1, 9, 32, torch.Generator())


def test_parameters_of_a_layer():
    layer = GatedLinearAttention(GLAConfig(40, 256, 1, 4))
    assert sum(each.numel() for each in layer.parameters()) == pytest.approx(4 * 256**2, rel=0.05)


def test_bad_input():
    for bad in (
        lambda: GLAConfig(40, 30, 2, 4),
        lambda: GLAConfig(40, 32, 0, 4),
        lambda: GLAConfig(40, 32, 2, 4, temperature=0),
        lambda: network()(torch.full((1, 3), 40)),
        lambda: network()(torch.zeros(1, 3, dtype=torch.long), [torch.zeros(1, 2, 8, 16)]),
    ):
        with pytest.raises(InputError):
            bad()
    with pytest.raises(UnknownNameError):
        GLAConfig(40, 32, 2, 4, gates="vector")
