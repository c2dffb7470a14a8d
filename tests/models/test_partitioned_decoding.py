"""Generation with the decode kernel against generation with PyTorch's attention."""

import pytest
import torch

from bitwright.core.errors import UnknownNameError
from bitwright.models.decoder import Decoder, DecoderConfig, KeyValueCache, generate
from bitwright.models.partitioned_decoding import partitioned_decoding


def model(kv_heads=2):
    torch.manual_seed(0)
    config = DecoderConfig(vocabulary=50, hidden=32, layers=2, heads=4, kv_heads=kv_heads, head_dim=8, feed_forward=48)
    return Decoder(config).eval().requires_grad_(False)


@pytest.mark.parametrize("schedule", ["lean", "fixed", "whole"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_same_tokens_and_logits(schedule, kv_heads):
    plain = model(kv_heads)
    changed = partitioned_decoding(plain, schedule)
    prompt = torch.randint(0, 50, (2, 7))
    assert torch.equal(generate(plain, prompt, 30), generate(changed, prompt, 30))
    for each, other in zip(plain.parameters(), changed.parameters(), strict=True):
        assert each is other
    caches = [KeyValueCache(plain.config, 2, 20, torch.float32) for _ in range(2)]
    for part in (prompt, prompt[:, :1], prompt[:, 1:2]):
        one, two = (network(part, cache) for network, cache in zip((plain, changed), caches, strict=True))
        assert torch.allclose(one, two, atol=1e-5)


def test_bad_schedule():
    with pytest.raises(UnknownNameError):
        partitioned_decoding(model(), "stream")
