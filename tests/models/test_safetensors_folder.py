"""Folders that are damaged, incomplete, or hold another kind of model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_decoder import TINY

from bitwright.core.errors import InputError
from bitwright.models.decoder import Decoder
from bitwright.models.safetensors_folder import _stored_names, decoder_from_folder, tokenizer_from_folder, weight_files

CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 80, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tiny: Decoder) -> Path:
    weights = dict(tiny.named_parameters())
    save_file({theirs: weights[ours] for ours, theirs in _stored_names(TINY).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_folder_loads(folder: Path, tiny: Decoder) -> None:
    ours = decoder_from_folder(folder)
    assert ours.config == TINY
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(ours(ids), tiny(ids))
        half = decoder_from_folder(folder, torch.bfloat16)
        assert half(ids).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden is 0"),
        ({"num_hidden_layers": 10**9}, "announces"),
        ({"num_hidden_layers": 3}, "lacks the weights"),
        ({"intermediate_size": 96}, "shape"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight"),
        ({"attention_bias": True}, "bias"),
        ({"sliding_window": 128}, "sliding-window"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "incomplete"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, change, message: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(InputError, match=message):
        decoder_from_folder(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    for content in (b"", data[:100], data[:-8], b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.safetensors"):
            decoder_from_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        decoder_from_folder(folder)
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        tokenizer_from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a usable tokenizer"):
        tokenizer_from_folder(folder)


def test_an_index_cannot_name_files_elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for bad in ({}, {"weight_map": {"a": "../../etc/passwd"}}, {"weight_map": {"a": "absent.safetensors"}}):
        index.write_text(json.dumps(bad))
        with pytest.raises(InputError, match="index"):
            weight_files(folder)
