from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.workload import Kind, Operator, Role, Workload
from bitwright.core.workload_summary import summarise, to_json
from bitwright.models.configurations import CONFIGURATIONS, TransformerConfiguration, configuration_from_json
from bitwright.models.trace import trace
from bitwright.models.trace_configuration import trace_configuration

TINY = TransformerConfiguration("tiny", 64, 2, 4, 96, 128, 2, gated=True, activation="silu", norm="rms", bias=False,
                                qkv_bias=False, tied_head=False)  # fmt: skip

# Published: model cards on the Hugging Face hub, torchvision's weight tables, and GPT-3's appendix D (174,600 M).
PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008, "gpt2": 124_439_808, "bert-base": 109_482_240, "bert-large": 335_141_888,
    "vit-b-16": 86_567_656, "vit-l-16": 304_326_632, "opt-1.3b": 1_315_758_080, "opt-6.7b": 6_658_473_984,
}  # fmt: skip


def test_parameter_counts_are_the_published_ones() -> None:
    for name, count in PUBLISHED.items():
        assert CONFIGURATIONS[name].parameters == count, name
    assert CONFIGURATIONS["gpt3-175b"].parameters == pytest.approx(174_600e6, rel=1e-4)
    assert CONFIGURATIONS["opt-66b"].parameters == pytest.approx(66e9, rel=0.01)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_traced_weights_are_the_configuration_s(name: str) -> None:
    workload = trace_configuration(name, tokens=16)
    assert workload.parameters == CONFIGURATIONS[name].parameters
    assert all(producer < consumer for producer, consumer in workload.edges())


def llama(**keywords: object) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=128, attn_implementation="eager", tie_word_embeddings=False, **keywords,
    ))  # fmt: skip


def test_prefill_and_training_equal_the_flop_counter() -> None:
    network, ids = llama(), torch.zeros(3, 10, dtype=torch.int64)

    with FlopCounterMode(display=False) as counter:
        logits = network(input_ids=ids, use_cache=False).logits
    forward = 2 * trace_configuration(TINY, batch=3, tokens=10, logits="all").macs
    assert forward == counter.get_total_flops()
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    training = trace_configuration(TINY, "training", batch=3, tokens=10)
    assert 2 * training.macs - forward == backward.get_total_flops()


def test_decode_work_and_cache_by_hand() -> None:
    config, batch, context = CONFIGURATIONS["llama-2-70b"], 4, 1000
    workload = trace_configuration(config, "decode", batch=batch, context=context)
    keys, layers = context + 1, 80
    cache = sum(size for _, size in workload.tensors(Role.KV).values())
    assert cache == 2 * layers * batch * 8 * keys * 128 * 2
    scores = [each for each in workload if each.kind is Kind.ATTENTION]
    assert sum(each.macs for each in scores) == layers * batch * 64 * keys * 2 * 128
    assert all(each.density == 1 for each in scores)
    read = sum(t.bytes(each.loops) for each in scores for t in each.inputs if t.role is Role.KV)
    written = sum(t.bytes(each.loops) for each in workload for t in each.outputs if t.role is Role.KV)
    assert read == cache
    assert written == 2 * layers * batch * 8 * 128 * 2
    linear = sum(each.macs for each in workload if each.kind is Kind.MATMUL)
    norms = (2 * layers + 1) * 8192
    assert linear == batch * (config.parameters - norms - 32000 * 8192)  # every weight once, the table not at all


def named(workload: Workload, name: str) -> Operator:
    return next(each for each in workload if each.name == name)


def test_names_causal_density_and_cached_prefix() -> None:
    workload = trace_configuration("llama-2-7b", batch=1, tokens=8)
    query = named(workload, "layers.12.attention.query")
    assert query.bytes == 2 * (8 * 4096 + 4096**2 + 8 * 4096)
    assert named(workload, "layers.12.attention.scores").density == pytest.approx(36 / 64)
    after = named(trace_configuration("llama-2-7b", tokens=8, context=24), "layers.0.attention.scores")
    assert after.density == pytest.approx(sum(range(25, 33)) / (8 * 32))
    assert named(workload, "head").loops["m"] == 1
    assert named(trace_configuration("llama-2-7b", tokens=8, logits="all"), "head").loops["m"] == 8


def test_training_updates_every_weight_once() -> None:
    workload = trace_configuration(TINY, "training", batch=2, tokens=8)
    updates = [each for each in workload if each.target == "adam"]
    assert sum(each.points for each in updates) == TINY.parameters
    state = workload.tensors(Role.OPTIMIZER)
    assert sum(size for _, size in state.values()) == 12 * TINY.parameters  # master copy and two moments in fp32
    made = {tensor.name for each in workload for tensor in each.outputs}
    assert {tensor.name for each in updates for tensor in each.inputs if tensor.role is Role.GRADIENT} <= made
    gradients = {t.name for each in workload for t in each.inputs if t.role is Role.GRADIENT}
    assert gradients <= made  # no gradient is read that nothing writes


def test_vision_and_encoder_work_by_hand() -> None:
    workload = trace_configuration("vit-b-16", batch=2)
    patches, tokens, hidden = 196, 197, 768
    layer = tokens * 12 * hidden**2 + 2 * tokens**2 * hidden
    assert workload.macs == 2 * (patches * 3 * 16 * 16 * hidden + 12 * layer + hidden * 1000)
    assert named(workload, "layers.0.attention.scores").density == 1
    bert = trace_configuration("bert-base", tokens=128)
    assert bert.macs == 12 * (128 * 12 * hidden**2 + 2 * 128**2 * hidden) + hidden**2
    assert trace_configuration("vit-b-16", "training").macs < 3 * trace_configuration("vit-b-16").macs


def test_memory_of_a_large_trace() -> None:
    tracemalloc.start()
    try:
        workload = trace_configuration("gpt3-175b", "training", batch=8, tokens=2048)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**30 / 8
    assert workload.macs == pytest.approx(3 * 8 * 2048 * 174.6e9, rel=0.04)  # 6 N D operations and attention


def test_summary_adds_up_and_is_json() -> None:
    workload = trace_configuration(TINY, tokens=8)
    rows = summarise(workload)
    assert sum(row.bytes for row in rows) == pytest.approx(workload.bytes)
    assert sum(row.macs for row in rows) == workload.macs
    assert sum(row.count for row in rows) == len(workload)
    assert sum(row.bytes_share for row in rows) == pytest.approx(1)
    data = json.loads(json.dumps(to_json(workload)))
    assert len(data["operators"]) == len(workload)
    assert data["parameters"] == TINY.parameters


def test_hugging_face_configurations(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = {
        "llama": transformers.LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, intermediate_size=96, vocab_size=128),
        "qwen": transformers.Qwen2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=2, intermediate_size=96, vocab_size=128),
        "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32),
        "opt": transformers.OPTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
                                      vocab_size=128, max_position_embeddings=32, word_embed_proj_dim=64),
        "bert": transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        intermediate_size=96, vocab_size=128),
    }  # fmt: skip
    for name, config in made.items():
        folder = tmp_path / name
        config.save_pretrained(folder)
        kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            network = kind.from_config(config)
        expected = sum(each.numel() for each in network.parameters())
        assert configuration_from_json(folder).parameters == expected, name
    assert trace(str(tmp_path / "llama"), tokens=4).macs > 0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="llama-2-7b"):
        trace("lama-2-7b")
    with pytest.raises(InputError, match="Dimensions"):
        trace("gpt2", dimensions={"batch": 1})
    with pytest.raises(InputError, match="no model file"):
        trace(str(tmp_path / "absent.gguf"))
    for keywords in ({"batch": 0}, {"tokens": 0}, {"phase": "decode"}, {"phase": "sleep"}, {"tokens": 4096}):
        with pytest.raises(InputError):
            trace_configuration("gpt2", **keywords)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a decoder"):
        trace_configuration("bert-base", "decode", context=4)
    with pytest.raises(InputError, match="Format"):
        trace_configuration("gpt2", tokens=4, formats={Role.WEIGHT: "int3"})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(InputError, match="num_attention_heads"):
        configuration_from_json(tmp_path)
    with pytest.raises(InputError, match="expected a positive"):
        TransformerConfiguration("x", 0, 1, 1, 1, 1)
