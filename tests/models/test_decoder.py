"""The decoder against transformers' Llama on the same weights, its cache against itself, and generation."""

from pathlib import Path

import pytest
import torch
from tiny_decoder import TINY

from bitwright.core.errors import InputError
from bitwright.models.decoder import Decoder, DecoderConfig, KeyValueCache, generate
from bitwright.models.safetensors_folder import _stored_names, decoder_from_folder


def llama(config: DecoderConfig, model: Decoder):
    """transformers' network with the weights of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary, hidden_size=config.hidden, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
            intermediate_size=config.feed_forward, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_embeddings, max_position_embeddings=config.max_positions,
        )
    ).eval()  # fmt: skip
    weights = dict(model.named_parameters())
    state = {theirs: weights[ours] for ours, theirs in _stored_names(config).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    theirs.tie_weights()
    return theirs


def greedy_of(theirs, ids: torch.Tensor, count: int) -> list[int]:
    with torch.inference_mode():
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=0,
        )  # fmt: skip
    return out[0].tolist()


def test_smollm2_logits_and_greedy_text_equal_transformers(smollm2) -> None:
    model = smollm2.decoder
    theirs = llama(model.config, model)
    ids = torch.tensor([smollm2.tokenizer.encode("Once upon a time, in the year 1611, there was a printer who").ids])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    expected = greedy_of_cached(theirs, ids, 64)
    assert generate(model, ids, 64)[0].tolist() == expected


def greedy_of_cached(theirs, ids: torch.Tensor, count: int) -> list[int]:
    """Greedy decoding by transformers' own cache, without the bookkeeping of its `generate`."""
    out, step, past = ids[0].tolist(), ids, None
    with torch.inference_mode():
        for _ in range(count):
            result = theirs(step, past_key_values=past, use_cache=True)
            past = result.past_key_values
            step = result.logits[:, -1].argmax(-1, keepdim=True)
            out.append(int(step))
    return out


@pytest.mark.slow
def test_smollm2_equals_transformers_own_reading_of_the_file(smollm2) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate installed")
    from transformers import AutoModelForCausalLM

    path = smollm2.files[0]
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([smollm2.tokenizer.encode("The engine multiplies the weights by").ids])
    with torch.inference_mode():
        torch.testing.assert_close(smollm2.decoder(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert generate(smollm2.decoder, ids, 64)[0].tolist() == greedy_of(theirs, ids, 64)


ROPE_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tied", "kv_heads", "head_dim", "rope"),
    [(True, 2, 8, None), (False, 6, 8, None), (False, 1, 12, None), (True, 3, 16, ROPE_LLAMA3)],
)
def test_a_transformers_folder_loads_with_equal_logits(tmp_path: Path, tied, kv_heads, head_dim, rope) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=72, tie_word_embeddings=tied, max_position_embeddings=128,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 700.0}, initializer_range=0.2,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = decoder_from_folder(tmp_path)
    ids = torch.randint(0, 101, (2, 90))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_parameter_count(tiny: Decoder) -> None:
    assert TINY.parameters == sum(parameter.numel() for parameter in tiny.parameters())


@pytest.mark.parametrize("cuts", [[7], [1, 2, 3, 4, 5, 6], [3, 6]])
def test_a_cache_changes_nothing(tiny: Decoder, cuts: list[int]) -> None:
    ids = torch.randint(0, TINY.vocabulary, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(TINY, 3, 12, torch.float32)
    with torch.inference_mode():
        parts = [tiny(part, cache) for part in torch.tensor_split(ids, cuts, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), tiny(ids), atol=2e-5, rtol=1e-5)
    assert cache.length == 12


def test_generation_is_seeded_and_stops(tiny: Decoder) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    first = generate(tiny, ids, 20, temperature=1.5, seed=5)
    assert torch.equal(first, generate(tiny, ids, 20, temperature=1.5, seed=5))
    assert not torch.equal(first, generate(tiny, ids, 20, temperature=1.5, seed=6))
    greedy = generate(tiny, ids[:1], 20)
    assert greedy.shape == (1, 23)
    with torch.inference_mode():
        assert greedy[0, 3:].tolist() == tiny(greedy[:, :-1]).argmax(-1)[0, 2:].tolist()
    stop = int(greedy[0, 5])
    stopped = generate(tiny, ids[:1], 20, stop=frozenset({stop}))
    assert stopped[0].tolist() == greedy[0, : stopped.shape[1]].tolist()
    assert int(stopped[0, -1]) == stop
    assert generate(tiny, ids, 0).equal(ids)


def test_bad_requests_are_refused(tiny: Decoder) -> None:
    for ids, count, message in [
        (torch.tensor([[97]]), 1, "vocabulary has ids 0 to 96"),
        (torch.tensor([[-1]]), 1, "vocabulary"),
        (torch.zeros(1, 0, dtype=torch.long), 1, "shape"),
        (torch.zeros(1, 3), 1, "integers"),
        (torch.tensor([[1]]), 64, "64 positions"),
    ]:
        with pytest.raises(InputError, match=message):
            generate(tiny, ids, count)
    with pytest.raises(InputError, match="Temperature -1"):
        generate(tiny, torch.tensor([[1]]), 1, temperature=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, "layers is 0"), ({"kv_heads": 4}, "cannot share"), ({"head_dim": 7}, "even"),
     ({"rope_factors": (1.0,)}, "1 rotary factors"), ({"norm_eps": float("nan")}, "norm_eps")],
)  # fmt: skip
def test_impossible_sizes_are_refused(change, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=message):
        replace(TINY, **change)
