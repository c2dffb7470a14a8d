"""Digit profiles of a model are those of the integers it multiplies."""

import numpy as np
import pytest
import torch
from tiny_decoder import TINY

from bitwright.core.errors import InputError
from bitwright.engine.digit_profiles import normal_profile
from bitwright.engine.expected_cycles import expected_array_cycles
from bitwright.models import integer
from bitwright.models.decoder import Decoder
from bitwright.models.operand_statistics import _recorded, model_profiles, statistics_of, summary
from bitwright.models.trace_configuration import trace_configuration


@pytest.mark.parametrize("causal", [True, False])
def test_recorded_codes_are_those_of_integer_attention(monkeypatch, causal):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 9, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 9, 8, generator=generator)
    real, codes = integer.quantise_symmetric, []
    monkeypatch.setattr(integer, "quantise_symmetric", lambda *a, **o: codes.append(real(*a, **o)) or codes[-1])
    found = []
    out = _recorded(integer.integer_attention, "x", 8, found, query, key, value, is_causal=causal, enable_gqa=True)
    assert torch.equal(out, integer.integer_attention(query, key, value, is_causal=causal, enable_gqa=True))
    q, k, v, p = (each.codes.numpy() for each in codes[:4])
    (_, left, right), (_, probabilities, values) = found
    assert np.array_equal(left, q.reshape(-1, 8))
    assert np.array_equal(right, np.repeat(k, 3, axis=1).reshape(-1, 8))
    assert np.array_equal(values, np.repeat(v, 3, axis=1).swapaxes(2, 3).reshape(-1, 9))
    assert np.abs(probabilities.astype(int) - p.reshape(-1, 9)).max() <= 1  # scores are summed in another order


def test_minilm(monkeypatch, tmp_path):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    profiles = model_profiles("minilm", tokens=64)
    assert len(profiles) == 6 * 8
    assert profiles == model_profiles("minilm", tokens=64)  # from the cache
    kinds = summary(profiles)
    assert set(kinds) == {"query", "key", "value", "output", "up", "down", "scores", "context"}
    linear = [each.right.digits for each in profiles if each.kind not in ("scores", "context")]
    assert np.mean(linear) == pytest.approx(2.37, abs=0.05)  # per-channel INT8 weights
    assert all("minilm, 64 tokens" in each.left.origin for each in profiles)


def test_profiles_for_another_network(monkeypatch, tmp_path):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    profiles = model_profiles("minilm", tokens=32)
    normal = normal_profile()
    work = trace_configuration("gpt2", tokens=64)
    find = statistics_of(profiles, (normal, normal))
    by_name = {operator.name: operator for operator in work}
    assert find(by_name["layers.7.attention.query"], 0)[1].origin.endswith("layers.1.query right")
    assert find(by_name["layers.2.attention.scores"], 1)[0].origin.endswith("layers.2.context left")
    assert find(by_name["head"], 0) == (normal, normal)
    with pytest.raises(InputError, match="head"):
        statistics_of(profiles)(by_name["head"], 0)
    for each in profiles:
        assert expected_array_cycles(each.left, 64, 8, 64, 8, 8, lanes=4).cycles > 0


def test_tiny_decoder_runs_recorded(tiny: Decoder):
    ids = torch.randint(0, TINY.vocabulary, (1, 15), generator=torch.Generator().manual_seed(0))
    twin = integer.integer_execution(tiny)
    plain = twin(ids)
    found: list = []
    for name, module in twin.named_modules():
        if hasattr(module, "attend"):
            original = module.attend
            module.attend = lambda *a, name=name, original=original, **o: _recorded(original, name, 8, found, *a, **o)
    assert torch.equal(twin(ids), plain)
    assert len(found) == 2 * TINY.layers
