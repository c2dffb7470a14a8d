"""A compact BERT encoder and sentence embeddings by mean pooling (MiniLM).

Sources: Devlin et al., "BERT" (2019), section 3; Reimers and Gurevych, "Sentence-BERT" (2019), section 3 (pooling).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import InputError
from bitwright.models.safetensors_folder import StoredTensors, read_json, weight_files


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a BERT encoder. Raises InputError for sizes that do not fit."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    max_positions: int = 512
    segments: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < 1e12:
                raise InputError(f"The encoder's {field.name} is {getattr(self, field.name)}; expected above 0.")
        if self.hidden % self.heads:
            raise InputError(f"A hidden size of {self.hidden} does not divide into {self.heads} heads.")


class EncoderLayer(nn.Module):
    """Bidirectional attention and a GELU feed-forward, each followed by residual and LayerNorm."""

    attend: Callable[..., Tensor] = staticmethod(functional.scaled_dot_product_attention)

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)
        self.output = nn.Linear(config.hidden, config.hidden)
        self.attention_norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.up = nn.Linear(config.hidden, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.hidden)
        self.feed_forward_norm = nn.LayerNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`x` (batch, tokens, hidden) through attention and feed-forward; `mask` is the attention mask."""
        batch, tokens, hidden = x.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(batch, tokens, self.heads, hidden // self.heads).transpose(1, 2)

        mixed = self.attend(split(self.query(x)), split(self.key(x)), split(self.value(x)), attn_mask=mask)
        x = self.attention_norm(x + self.output(mixed.transpose(1, 2).reshape(batch, tokens, hidden)))
        out: Tensor = self.feed_forward_norm(x + self.down(functional.gelu(self.up(x))))
        return out


class Encoder(nn.Module):
    """Token ids in, one vector per token out."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = nn.Embedding(config.max_positions, config.hidden)
        self.segments = nn.Embedding(config.segments, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (batch, tokens, hidden) of token ids (batch, tokens), all of segment 0.

        `mask` (batch, tokens), bool, is true for real tokens; padding is not attended to.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.embedding(ids) + self.positions(positions) + self.segments.weight[0])
        wide = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, wide)
        out: Tensor = x
        return out


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: states (batch, tokens, hidden), mask (batch, tokens) bool -> (batch, hidden)."""
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def embed_sentences(
    model: Encoder, tokenizer: Tokenizer, sentences: Sequence[str], max_tokens: int = 256, batch: int = 32,
    run: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Unit vectors (sentences, hidden): mean-pooled hidden states, scaled to length 1.

    Sentences are cut to `max_tokens` tokens, the closing one kept. `run` computes the hidden states in place of the
    model; `packed_encoder.PackedEncoder(model)` does so without padding. Raises InputError for no sentences or a
    `max_tokens` the model does not take.
    """
    if not sentences or not 3 <= max_tokens <= model.config.max_positions or batch < 1:
        raise InputError(
            f"{len(sentences)} sentences of up to {max_tokens} tokens in batches of {batch} given; expected at least "
            f"one sentence and 3 to {model.config.max_positions} tokens."
        )
    device = model.embedding.weight.device
    encoded: list[list[int]] = []
    for encoding in tokenizer.encode_batch(list(sentences)):
        whole: list[int] = encoding.ids
        encoded.append(whole if len(whole) <= max_tokens else [*whole[: max_tokens - 1], whole[-1]])
    vectors = []
    with torch.inference_mode():
        for at in range(0, len(encoded), batch):
            group = encoded[at : at + batch]
            longest = max(map(len, group))
            ids = torch.tensor([each + [0] * (longest - len(each)) for each in group], device=device)
            lengths = torch.tensor([len(each) for each in group], device=device)
            mask = torch.arange(longest, device=device) < lengths[:, None]
            states = (run or model)(ids, mask)
            vectors.append(functional.normalize(mean_pool(states, mask), dim=-1))
    return torch.cat(vectors)


def encoder_config_from_json(config: Mapping[str, Any], source: str) -> EncoderConfig:
    """The configuration from a Hugging Face config.json of model type "bert"; InputError names `source`."""
    if config.get("model_type") != "bert":
        raise InputError(f"{source} describes a model of type {config.get('model_type')!r}; expected 'bert'.")
    if config.get("hidden_act", "gelu") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
        raise InputError(f"{source} uses another activation than GELU or relative positions; neither is supported.")
    keys = {"vocabulary": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers",
            "heads": "num_attention_heads", "feed_forward": "intermediate_size",
            "max_positions": "max_position_embeddings", "segments": "type_vocab_size",
            "norm_eps": "layer_norm_eps"}  # fmt: skip
    values: dict[str, Any] = {}
    for ours, theirs in keys.items():
        value = config.get(theirs)
        wanted = float if ours == "norm_eps" else int
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise InputError(f"{source}: {theirs!r} is {value!r}; expected a number.")
        values[ours] = value
    return EncoderConfig(**values)


def _stored_names(config: EncoderConfig) -> dict[str, str]:
    names = {"embedding.weight": "embeddings.word_embeddings.weight",
             "positions.weight": "embeddings.position_embeddings.weight",
             "segments.weight": "embeddings.token_type_embeddings.weight",
             "norm.weight": "embeddings.LayerNorm.weight", "norm.bias": "embeddings.LayerNorm.bias"}  # fmt: skip
    parts = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
             "output": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
             "up": "intermediate.dense", "down": "output.dense", "feed_forward_norm": "output.LayerNorm"}  # fmt: skip
    for layer in range(config.layers):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"layers.{layer}.{ours}.{kind}"] = f"encoder.layer.{layer}.{theirs}.{kind}"
    return names


def encoder_from_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder of a Hugging Face folder (config.json, *.safetensors) with its weights cast to `dtype`.

    Raises InputError for missing or damaged files and weights that do not fit the configuration.
    """
    config = encoder_config_from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    stored = StoredTensors(weight_files(folder))
    if config.layers > len(stored.shapes):  # before a module of that many layers is built
        raise InputError(f"{folder} announces {config.layers} layers but holds only {len(stored.shapes)} tensors.")
    with torch.device("meta"):
        model = Encoder(config)
    names = _stored_names(config)
    state = {}
    for name, parameter in model.named_parameters():
        given = next((each for each in (names[name], f"bert.{names[name]}") if each in stored.shapes), None)
        if given is None:
            raise InputError(f"{folder} lacks the weights of {names[name]!r}.")
        if stored.shapes[given] != tuple(parameter.shape):
            shape, expected = stored.shapes[given], tuple(parameter.shape)
            raise InputError(f"{folder}: the weights of {given!r} have shape {shape}; expected {expected}.")
        state[name] = given
    model.load_state_dict({name: stored.read(given).to(dtype) for name, given in state.items()}, assign=True)
    return model.eval().requires_grad_(False)
