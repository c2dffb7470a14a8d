"""A compact Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, key-value cache.

Sources: Touvron et al., "LLaMA" (2023), section 2.2; rotary positions as in Su et al., "RoFormer" (2021),
section 3.2.2, on the two halves of a head (the Hugging Face order); grouped-query attention as in Ainslie et al.,
"GQA" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import InputError


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama-like decoder.

    `head_dim` is even; `heads` is a multiple of `kv_heads`. `rope_factors`, when given, divides each of the
    head_dim/2 rotary frequencies (how Llama 3.1 stretches its context). Raises InputError for sizes that do not fit.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] = ()
    tied_embeddings: bool = True
    max_positions: int = 2048

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < 1e12:
                raise InputError(f"The decoder's {field.name} is {value}; expected a positive number.")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly.")
        if self.head_dim % 2:
            raise InputError(f"The decoder's head_dim is {self.head_dim}; rotary positions need an even one.")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise InputError(f"{len(self.rope_factors)} rotary factors given for {self.head_dim // 2} frequencies.")

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        projections = (2 * self.heads + 2 * self.kv_heads) * self.head_dim + 3 * self.feed_forward
        layer = self.hidden * (projections + 2)
        tables = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * layer + tables + self.hidden


def checked_config(source: str, **sizes: Any) -> DecoderConfig:
    """A `DecoderConfig` of `sizes` read from `source`, which the InputError for impossible ones names."""
    try:
        return DecoderConfig(**sizes)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


class KeyValueCache:
    """Keys and values of the positions seen so far, (layers, batch, kv_heads, capacity, head_dim) each."""

    def __init__(
        self, config: DecoderConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (batch, kv_heads, tokens, head_dim) after `length` and return all keys and values up to there."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or, for float64, in float64."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` normalised over its last axis."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_tables(config: DecoderConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (tokens, head_dim) in float32, for integer `positions` (tokens,); RoFormer equation 34."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_factors:
        frequencies = frequencies / torch.tensor(config.rope_factors, device=positions.device)
    angles = torch.outer(positions.float(), frequencies)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim/2) of x (batch, heads, tokens, head_dim) by the angles of `rotary_tables`."""
    first, second = x.chunk(2, -1)
    return x * cosines.to(x.dtype) + torch.cat((-second, first), -1) * sines.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    attend: Callable[..., Tensor] = staticmethod(functional.scaled_dot_product_attention)
    rotate: Callable[..., Tensor] = staticmethod(rotate)  # queries and keys (batch, heads, tokens, head_dim)

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        """Attention of `x` (batch, tokens, hidden); keys and values of `layer` go through `cache` if given."""
        batch, tokens, _ = x.shape

        def split(projected: Tensor) -> Tensor:  # (batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)
            return projected.view(batch, tokens, -1, self.config.head_dim).transpose(1, 2)

        query = self.rotate(split(self.query(x)), *rotary)
        key = self.rotate(split(self.key(x)), *rotary)
        value = split(self.value(x))
        if cache is not None:
            key, value = cache.append(layer, key, value)
        causal = mask is None and tokens > 1
        mixed = self.attend(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=self.config.heads != self.config.kv_heads
        )
        out: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (batch, tokens, hidden) through gate, SiLU, product with up, and down."""
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, layer: int, cache: KeyValueCache | None
    ) -> Tensor:
        """One layer on `x` (batch, tokens, hidden); the same shape comes out."""
        x = x + self.attention(self.attention_norm(x), rotary, mask, layer, cache)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Decoder(nn.Module):
    """The whole network: token ids in, logits out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (batch, tokens, vocabulary) of token ids (batch, tokens).

        With a `cache` the ids continue the sequence it holds, and it grows by them.
        """
        logits: Tensor = self.lm_head(self.hidden_states(ids, cache))
        return logits

    def hidden_states(self, ids: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """The normed output of the last layer, (batch, tokens, hidden): what the head sees."""
        past = cache.length if cache is not None else 0
        tokens = ids.shape[1]
        positions = torch.arange(past, past + tokens, device=ids.device)
        rotary = rotary_tables(self.config, positions)
        mask = None
        if past and tokens > 1:  # query i sits at position past + i
            mask = torch.arange(past + tokens, device=ids.device) <= positions[:, None]
        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, index, cache)
        if cache is not None:
            cache.length += tokens
        out: Tensor = self.norm(x)
        return out


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a `Decoder`, by name; a tied head is not among them."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def check_shapes(expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise InputError, naming `source`, for a parameter that is missing from `shapes` or has another shape."""
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise InputError(f"{source} lacks the weights of {len(missing)} tensors, {missing[0]!r} first.")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise InputError(f"{source}: the weights of {name!r} have shape {shapes[name]}; expected {shape}.")


def assign_weights(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], source: str
) -> Decoder:
    """A `Decoder` whose parameters are `read(name)`; nothing of the model's size is allocated twice.

    `shapes` gives the stored shape of every parameter that the source holds; all are checked before any is read.
    Raises InputError, naming `source`, for a missing parameter or another shape.
    """
    with torch.device("meta"):
        model = Decoder(config)
    expected = parameter_shapes(config)
    check_shapes(expected, shapes, source)
    state = {name: read(name) for name in expected}
    model.load_state_dict(state, strict=False, assign=True)
    if config.tied_embeddings:
        model.lm_head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)


def generate(
    model: Decoder,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
    cache: KeyValueCache | None = None,
) -> Tensor:
    """Continue token ids (batch, tokens) by up to `max_new_tokens`; returns (batch, tokens + new).

    Temperature 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature) by a generator
    seeded with `seed`. Generation ends early when every sequence has produced a token of `stop`. `cache`, empty and of
    enough capacity, keeps keys and values in another way.
    Raises InputError for ids outside the vocabulary, an empty prompt, or more positions than the model has.
    """
    config = model.config
    check_ids(ids, config.vocabulary)
    if temperature < 0 or max_new_tokens < 0:
        raise InputError(f"Temperature {temperature} and {max_new_tokens} new tokens given; both must be 0 or more.")
    if ids.shape[1] + max_new_tokens > config.max_positions:
        raise InputError(
            f"{ids.shape[1]} + {max_new_tokens} tokens exceed the model's {config.max_positions} positions; "
            "ask for fewer."
        )
    weight = model.embedding.weight
    if cache is None:
        cache = KeyValueCache(config, ids.shape[0], ids.shape[1] + max_new_tokens, weight.dtype, weight.device)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    stops = torch.tensor(sorted(stop), dtype=ids.dtype, device=ids.device)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    step = ids
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            logits = model.lm_head(model.hidden_states(step, cache)[:, -1]).float()
            if temperature == 0:
                step = logits.argmax(-1, keepdim=True)
            else:
                step = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, step), 1)
            done |= torch.isin(step[:, 0], stops)
            if bool(done.all()):
                break
    return ids


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise InputError unless `ids` is a non-empty (batch, tokens) tensor of integers in 0..vocabulary-1."""
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise InputError(
            f"Token ids of shape {tuple(ids.shape)}, {ids.dtype} given; expected integers (batch, tokens)."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(f"Token ids from {low} to {high} given; the vocabulary has ids 0 to {vocabulary - 1}.")
