"""Networks of gated linear attention: decoders whose memory of the past is one matrix per head.

Source: arXiv 2312.06635, section 4.4 (layer, gates, block); its ablations (table 4) as kinds of gates: "channel", a
gate per key channel made from the token (the method), "scalar", one per head, "fixed", a constant per head that does
not depend on the token (arXiv 2307.08621, as RetNet), and "none". Blocks are pre-norm with residuals around attention
and SwiGLU, as in the released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.gated_linear_attention import gla, state_bytes
from bitwright.models.decoder import DecoderConfig, FeedForward, RMSNorm, check_ids

GATES = ("channel", "scalar", "fixed", "none")
States = list[Tensor]


@dataclass(frozen=True)
class GLAConfig:
    """Sizes: keys of all heads together are hidden / 2 wide and values hidden, as in the paper; `feed_forward` 0 is
    8/3 hidden, rounded up to 256. Raises InputError for sizes that do not fit, UnknownNameError for other gates."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int = 4
    gate_rank: int = 16
    temperature: float = 16.0
    gates: str = "channel"
    feed_forward: int = 0
    chunk: int = 64
    sub: int = 16

    def __post_init__(self) -> None:
        if self.gates not in GATES:
            raise UnknownNameError("kind of gates", self.gates, GATES)
        if min(self.vocabulary, self.hidden, self.layers, self.heads, self.gate_rank) < 1 or not self.temperature > 0:
            raise InputError(f"{self}: sizes are at least 1 and the temperature is above 0.")
        if self.hidden % (2 * self.heads):
            raise InputError(f"Keys of {self.hidden} / 2 channels do not divide into {self.heads} heads.")

    @property
    def feed_forward_width(self) -> int:
        """Inner width of the feed-forward part."""
        return self.feed_forward or -(-8 * self.hidden // 3 // 256) * 256

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all layers of one sequence, whatever its length."""
        keys, values = self.hidden // 2 // self.heads, self.hidden // self.heads
        return state_bytes(self.heads, keys, values, self.layers)


class GatedLinearAttention(nn.Module):
    """One layer of attention: projections, gates, the recurrence, a norm per head and an output gate."""

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        self.config = config
        hidden, keys, heads = config.hidden, config.hidden // 2, config.heads
        self.query = nn.Linear(hidden, keys, bias=False)
        self.key = nn.Linear(hidden, keys, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.output_gate = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.norm = RMSNorm(hidden // heads, 1e-5)
        shared = [self.query, self.key]
        if config.gates == "channel":
            self.gate = nn.Sequential(
                nn.Linear(hidden, config.gate_rank, bias=False), nn.Linear(config.gate_rank, keys)
            )
            shared += [each for each in self.gate if isinstance(each, nn.Linear)]
        elif config.gates == "scalar":
            self.gate = nn.Sequential(nn.Linear(hidden, heads))
        for each in (*shared, self.value):
            nn.init.xavier_uniform_(each.weight, gain=2**-2.5)

    def log_gates(self, x: Tensor) -> Tensor:
        """Logarithms of the gates for `x` (batch, tokens, hidden): (batch, tokens, heads, keys of a head), <= 0."""
        config, shape = self.config, (*x.shape[:2], self.config.heads, self.config.hidden // 2 // self.config.heads)
        if config.gates == "none":
            return x.new_zeros(shape)
        if config.gates == "fixed":
            steps = torch.arange(config.heads, dtype=x.dtype)
            return torch.log1p(-(2.0 ** (-5 - steps)))[:, None].expand(shape)
        gates = functional.logsigmoid(self.gate(x)) / config.temperature
        return gates[..., None].expand(shape) if config.gates == "scalar" else gates.view(shape)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs like `x` (batch, tokens, hidden) and the state (batch, heads, keys, values) after its last token."""
        config, batch, tokens = self.config, x.shape[0], x.shape[1]
        q, k, v = (made(x).view(batch, tokens, config.heads, -1) for made in (self.query, self.key, self.value))
        found = gla(
            q, k, v, self.log_gates(x), chunk=config.chunk, sub=config.sub, initial_state=state, return_state=True,
            validate=False,
        )  # fmt: skip
        mixed, last = found
        normed = self.norm(mixed).reshape(batch, tokens, config.hidden)
        out: Tensor = self.output(functional.silu(self.output_gate(x)) * normed)
        return out, last


class GLATransformer(nn.Module):
    """Token ids in, logits out; `states` carry a sequence on from call to call in constant memory."""

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        self.config = config
        shared = DecoderConfig(
            vocabulary=config.vocabulary, hidden=config.hidden, layers=config.layers, heads=1, kv_heads=1, head_dim=2,
            feed_forward=config.feed_forward_width,
        )  # fmt: skip
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(config.hidden))
        self.attention = nn.ModuleList(GatedLinearAttention(config) for _ in range(config.layers))
        self.attention_norms = nn.ModuleList(RMSNorm(config.hidden, 1e-5) for _ in range(config.layers))
        self.feed_forward = nn.ModuleList(FeedForward(shared) for _ in range(config.layers))
        self.feed_forward_norms = nn.ModuleList(RMSNorm(config.hidden, 1e-5) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, 1e-5)

    def forward(self, ids: Tensor, states: Sequence[Tensor] | None = None) -> tuple[Tensor, States]:
        """Logits (batch, tokens, vocabulary) of ids (batch, tokens), and the states of all layers after them.

        `states` are those of the tokens before (none: the sequence begins). Raises InputError for ids outside the
        vocabulary and another number of states.
        """
        check_ids(ids, self.config.vocabulary)
        if states is not None and len(states) != self.config.layers:
            raise InputError(f"{len(states)} states were given for {self.config.layers} layers.")
        x, after = self.embedding(ids), []
        for i, attend in enumerate(self.attention):
            mixed, state = attend(self.attention_norms[i](x), None if states is None else states[i])
            x = x + mixed
            x = x + self.feed_forward[i](self.feed_forward_norms[i](x))
            after.append(state)
        return functional.linear(self.norm(x), self.embedding.weight), after


def recall_batch(
    batch: int, pairs: int, tokens: int, generator: torch.Generator, symbols: int = 64
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (arXiv 2312.04927): `pairs` of key and value, then keys again, each at a random
    place after them; the target at a key is its value, -100 elsewhere. Ids (batch, tokens) below 2 * symbols + 1."""
    if tokens < 4 * pairs or pairs > symbols:
        raise InputError(f"{pairs} pairs of {symbols} symbols need {4 * pairs} tokens, not {tokens}.")
    keys = torch.stack([torch.randperm(symbols, generator=generator)[:pairs] for _ in range(batch)])
    values = symbols + torch.randint(symbols, (batch, pairs), generator=generator)
    ids = torch.full((batch, tokens), 2 * symbols)
    ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
    targets = torch.full((batch, tokens), -100)
    room = tokens - 2 * pairs
    places = 2 * pairs + torch.stack([torch.randperm(room, generator=generator)[:pairs] for _ in range(batch)])
    rows = torch.arange(batch)[:, None]
    ids[rows, places] = keys
    targets[rows, places] = values
    return ids, targets
