"""Sizes of published transformers as data, and of others from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from bitwright.core.errors import InputError, UnknownNameError


@dataclass(frozen=True)
class TransformerConfiguration:
    """Sizes of a transformer: a causal decoder, a bidirectional encoder (BERT) or an image classifier (ViT).

    `positions` is the number of learned positions, 0 for rotary ones; `bias` says whether projections and feed-forward
    have biases (`qkv_bias` the query, key and value alone); `segments`, `pooler`: BERT's token types and pooler;
    `image`, `patch`, `channels`, `classes`: the image side, patch side, input channels and outputs of a vision model.
    Raises InputError for sizes that do not fit together.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int = 0
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden / heads
    positions: int = 0
    gated: bool = False
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    bias: bool = True
    qkv_bias: bool = True
    tied_head: bool = True
    family: Literal["decoder", "encoder", "vision"] = "decoder"
    segments: int = 0
    pooler: bool = False
    image: int = 0
    patch: int = 0
    channels: int = 3
    classes: int = 0

    def __post_init__(self) -> None:
        required: tuple[str, ...] = ("hidden", "layers", "heads", "feed_forward")
        if self.family == "vision":
            required += ("image", "patch", "channels", "classes")
        else:
            required += ("vocabulary",)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and (value < 0 or (field.name in required and value < 1)):
                raise InputError(f"Configuration {self.name!r}: {field.name} is {value}; expected a positive number.")
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_dim:
            if self.hidden % self.heads:
                raise InputError(f"Configuration {self.name!r}: hidden {self.hidden} is not {self.heads} equal heads.")
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.heads % self.kv_heads:
            raise InputError(f"Configuration {self.name!r}: {self.heads} heads cannot share {self.kv_heads} KV heads.")
        if self.family == "vision" and self.image % self.patch:
            raise InputError(
                f"Configuration {self.name!r}: image {self.image} is not a multiple of patch {self.patch}."
            )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2 if self.patch else 0

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norm = self.hidden * (2 if self.norm == "layer" else 1)
        layer = self.hidden * (2 * query + 2 * key) + (3 if self.gated else 2) * self.hidden * self.feed_forward
        layer += 2 * norm
        layer += (query + 2 * key) * self.qkv_bias
        layer += (self.hidden + self.feed_forward * (2 if self.gated else 1) + self.hidden) * self.bias
        total = self.layers * layer + norm  # the last is the final norm, for BERT that of the embedding
        total += (self.vocabulary * (1 if self.tied_head else 2) + self.positions + self.segments) * self.hidden
        if self.pooler:
            total += self.hidden * (self.hidden + 1)
        if self.family == "vision":
            total += self.patch**2 * self.channels * self.hidden + self.hidden  # patches
            total += self.hidden + self.classes * (self.hidden + 1)  # class token, classifier
        return total


def _llama(name: str, hidden: int, layers: int, heads: int, feed_forward: int, vocabulary: int, kv_heads: int = 0,
           tied_head: bool = False) -> TransformerConfiguration:  # fmt: skip
    return TransformerConfiguration(name, hidden, layers, heads, feed_forward, vocabulary, kv_heads, gated=True,
                                    activation="silu", norm="rms", bias=False, qkv_bias=False,
                                    tied_head=tied_head)  # fmt: skip


def _opt(name: str, hidden: int, layers: int, heads: int) -> TransformerConfiguration:
    # Positions 2048 and two reserved rows; vocabulary padded to 50272 (facebook/opt-* config.json).
    return TransformerConfiguration(name, hidden, layers, heads, 4 * hidden, 50272, positions=2050, activation="relu")


def _bert(name: str, hidden: int, layers: int, heads: int) -> TransformerConfiguration:
    return TransformerConfiguration(name, hidden, layers, heads, 4 * hidden, 30522, positions=512, family="encoder",
                                    segments=2, pooler=True)  # fmt: skip


def _vit(name: str, hidden: int, layers: int, heads: int) -> TransformerConfiguration:
    return TransformerConfiguration(name, hidden, layers, heads, 4 * hidden, positions=197, family="vision", image=224,
                                    patch=16, classes=1000)  # fmt: skip


CONFIGURATIONS: Mapping[str, TransformerConfiguration] = MappingProxyType({each.name: each for each in (
    # Brown et al., "Language Models are Few-Shot Learners" (2020), table 2.1 and appendix D; vocabulary of GPT-2.
    TransformerConfiguration("gpt3-175b", 12288, 96, 96, 49152, 50257, positions=2048),
    # Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2; openai-community/gpt2.
    TransformerConfiguration("gpt2", 768, 12, 12, 3072, 50257, positions=1024),
    # Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), table 1.
    _opt("opt-1.3b", 2048, 24, 32), _opt("opt-6.7b", 4096, 32, 32), _opt("opt-13b", 5120, 40, 40),
    _opt("opt-30b", 7168, 48, 56), _opt("opt-66b", 9216, 64, 72), _opt("opt-175b", 12288, 96, 96),
    # Touvron et al., "Llama 2" (2023), section 2.2 and table 1; meta-llama/Llama-2-* config.json.
    _llama("llama-2-7b", 4096, 32, 32, 11008, 32000), _llama("llama-2-13b", 5120, 40, 40, 13824, 32000),
    _llama("llama-2-70b", 8192, 80, 64, 28672, 32000, 8),
    # Grattafiori et al., "The Llama 3 Herd of Models" (2024), table 3; meta-llama/Meta-Llama-3-* config.json.
    _llama("llama-3-8b", 4096, 32, 32, 14336, 128256, 8), _llama("llama-3-70b", 8192, 80, 64, 28672, 128256, 8),
    # Jiang et al., "Mistral 7B" (2023), table 1.
    _llama("mistral-7b", 4096, 32, 32, 14336, 32000, 8),
    # HuggingFaceTB/SmolLM2-135M config.json; Ben Allal et al., "SmolLM2" (2025).
    _llama("smollm2-135m", 576, 30, 9, 1536, 49152, 3, tied_head=True),
    # Devlin et al., "BERT" (2019), section 3; google-bert/bert-*-uncased config.json.
    _bert("bert-base", 768, 12, 12), _bert("bert-large", 1024, 24, 16),
    # Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), table 1; torchvision vit_b_16, vit_l_16.
    _vit("vit-b-16", 768, 12, 12), _vit("vit-l-16", 1024, 24, 16),
)})  # fmt: skip


def configuration(name: str) -> TransformerConfiguration:
    """A published configuration by name. Raises UnknownNameError, which lists the known ones."""
    if name not in CONFIGURATIONS:
        raise UnknownNameError("configuration", name, CONFIGURATIONS)
    return CONFIGURATIONS[name]


# Hugging Face keys by model type; a type not listed is refused rather than guessed.
_LLAMA_LIKE = ("llama", "mistral", "qwen2")


def configuration_from_json(path: Path) -> TransformerConfiguration:
    """Sizes from a Hugging Face `config.json` (Llama-like, GPT-2, OPT, BERT, ViT) or a folder that holds one.

    Raises InputError for a file that is missing, is not JSON, lacks a size, or is of another model type.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a model configuration: expected a JSON object.")
    kind = content.get("model_type")

    def size(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = content.get(key)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise InputError(f"{path}: {key} is {value!r}; expected a whole number above 0.")
                return value
        if default is None:
            raise InputError(f"{path}: no {' or '.join(keys)}; expected in a {kind} configuration.")
        return default

    name = str(content.get("_name_or_path") or path.parent.name or path.stem)
    tied = bool(content.get("tie_word_embeddings", True))
    if kind in _LLAMA_LIKE:
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        qkv_bias = bool(content.get("attention_bias", kind == "qwen2"))
        if (qkv_bias and kind != "qwen2") or content.get("mlp_bias"):
            raise InputError(
                f"{path}: a {kind} with attention_bias or mlp_bias is not described by TransformerConfiguration."
            )
        return TransformerConfiguration(
            name, hidden, size("num_hidden_layers"), heads, size("intermediate_size"), size("vocab_size"),
            size("num_key_value_heads", default=heads), size("head_dim", default=hidden // heads), gated=True,
            activation="silu", norm="rms", bias=False, qkv_bias=qkv_bias,
            tied_head=bool(content.get("tie_word_embeddings", False)),
        )  # fmt: skip
    if kind == "gpt2":
        hidden = size("n_embd")
        return TransformerConfiguration(
            name, hidden, size("n_layer"), size("n_head"), size("n_inner", default=4 * hidden), size("vocab_size"),
            positions=size("n_positions"), tied_head=tied,
        )  # fmt: skip
    if kind == "opt":
        if content.get("word_embed_proj_dim", content.get("hidden_size")) != content.get("hidden_size"):
            raise InputError(f"{path}: an OPT with projected embeddings is not described by TransformerConfiguration.")
        return TransformerConfiguration(
            name, size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads"), size("ffn_dim"),
            size("vocab_size"), positions=size("max_position_embeddings") + 2, activation="relu", tied_head=tied,
        )  # fmt: skip
    if kind in ("bert", "vit"):
        image = kind == "vit"
        side, patch = (size("image_size"), size("patch_size")) if image else (0, 0)
        labels = len(content["id2label"]) if isinstance(content.get("id2label"), dict) else 1000
        return TransformerConfiguration(
            name, size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads"),
            size("intermediate_size"), 0 if image else size("vocab_size"),
            positions=(side // patch) ** 2 + 1 if image else size("max_position_embeddings"),
            family="vision" if image else "encoder", segments=0 if image else size("type_vocab_size", default=2),
            pooler=not image, image=side, patch=patch, classes=labels if image else 0,
            channels=size("num_channels", default=3),
        )  # fmt: skip
    raise InputError(
        f"{path}: model_type {kind!r} is not known; expected llama, mistral, qwen2, gpt2, opt, bert or vit."
    )
