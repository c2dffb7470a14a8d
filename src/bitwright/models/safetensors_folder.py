"""Llama-like models from a Hugging Face folder: config.json, *.safetensors (one file or sharded), tokenizer.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from bitwright.core.errors import InputError
from bitwright.models.decoder import Decoder, DecoderConfig, assign_weights, checked_config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, naming the file, when there is none."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}; expected a JSON object.")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else all of them, sorted.

    Raises InputError when there are none, or the index names a file that is not in the folder itself.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise InputError(f"{folder} holds no *.safetensors file.")
        return found
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index} has no usable 'weight_map' from tensor names to file names.")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise InputError(f"{index} names {file.name!r}, which is not a file in {folder}.")
    return files


class StoredTensors:
    """The tensors of several safetensors files by name: shapes at once, data on demand (memory-mapped)."""

    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[str] = set()
        self._files: dict[str, Any] = {}
        for path in files:
            try:
                handle: Any = safe_open(str(path), framework="pt")
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    part = handle.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes.add(str(part.get_dtype()))
                    self._files[name] = handle
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} is not a usable safetensors file: {error}.") from None

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, read from the file that holds it."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def decoder_config_from_json(config: Mapping[str, Any], source: str) -> DecoderConfig:
    """The decoder's configuration from a Hugging Face config.json of model type "llama" (or an equal "mistral").

    Raises InputError, naming `source`, for other model types, missing fields, and features the decoder does not have
    (biases, other activations, sliding windows, other rotary scalings than "llama3").
    """
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise InputError(f"{source} describes a model of type {kind!r}; supported are 'llama' and 'mistral'.")
    if config.get("hidden_act", "silu") != "silu" or config.get("attention_bias") or config.get("mlp_bias"):
        raise InputError(f"{source} has biases or another activation than SiLU, which the decoder does not support.")
    if config.get("sliding_window"):
        raise InputError(f"{source} uses sliding-window attention, which the decoder does not support.")

    def number(key: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise InputError(f"{source}: {key!r} is {value!r}; expected a number.")
        return value

    hidden, heads = number("hidden_size", int), number("num_attention_heads", int)
    head_dim = number("head_dim", int, hidden // max(heads, 1))
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(scaling.get("rope_theta") or number("rope_theta", (int, float), 10000.0))
    return checked_config(
        source,
        vocabulary=number("vocab_size", int),
        hidden=hidden,
        layers=number("num_hidden_layers", int),
        heads=heads,
        kv_heads=number("num_key_value_heads", int, heads),
        head_dim=head_dim,
        feed_forward=number("intermediate_size", int),
        norm_eps=number("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_factors=_rope_factors(scaling, theta, head_dim, source),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=number("max_position_embeddings", int, 2048),
    )


def _rope_factors(scaling: Mapping[str, Any], theta: float, head_dim: int, source: str) -> tuple[float, ...]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended linearly."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return ()
    if kind != "llama3":
        raise InputError(f"{source} scales rotary positions by {kind!r}; supported are 'default' and 'llama3'.")
    try:
        factor = float(scaling["factor"])
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        length = float(scaling["original_max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: the 'llama3' rotary scaling is incomplete: {error}.") from None
    if not (factor >= 1 and 0 < low < high and length > 0):
        raise InputError(f"{source}: the 'llama3' rotary scaling has impossible values.")
    factors = []
    for index in range(0, head_dim, 2):
        turns = length / (2 * math.pi * theta ** (index / head_dim))  # of this frequency within the trained length
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / (keep + (1.0 - keep) / factor))
    return tuple(factors)


def _stored_names(config: DecoderConfig) -> dict[str, str]:
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not config.tied_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    parts = {
        "attention_norm": "input_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm", "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj", "feed_forward.down": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(config.layers):
        for ours, theirs in parts.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return names


def decoder_from_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The decoder of a Hugging Face folder with its weights cast to `dtype`.

    Raises InputError for a missing or damaged file, an unsupported configuration, and weights that do not fit it.
    """
    config = decoder_config_from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    stored = StoredTensors(weight_files(folder))
    if config.layers > len(stored.shapes):  # before a module of that many layers is built
        raise InputError(f"{folder} announces {config.layers} layers but holds only {len(stored.shapes)} tensors.")
    names = _stored_names(config)
    shapes = {ours: stored.shapes[theirs] for ours, theirs in names.items() if theirs in stored.shapes}
    return assign_weights(config, shapes, lambda name: stored.read(names[name]).to(dtype), str(folder))


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer in tokenizer.json. Raises InputError when it is missing or damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; a model folder needs its tokenizer to read text.")
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise InputError(f"{path} is not a usable tokenizer: {error}.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
