"""K-sort: channels of queries and keys permuted once, so that large key channels share blocks of the key cache.

Source: Trukhanov and Soloveychik, "Accurate Block Quantization in LLMs with Outliers" (2024), arXiv 2403.20137. For one
key-value head with rows W_k[c] (row c makes channel c), s_c = |W_k[c]|; channels are put in descending order of s in
W_k and, for every query head that shares the head, in W_q. Scores q.k stay what they are in exact arithmetic.

The norm of a row is the size of its channel for inputs without a direction. Two other scores, not of the paper, see the
directions that inputs have: "scaled-norm" is the norm of W_k[c] * g, g the learned scale of the norm before the layer;
"calibrated" is the root mean square of the keys while the model runs, on text, or, where no data may be used, on random
tokens.

Rotary positions turn pairs of channels. "permuted" allows any permutation pi and turns the permuted vector x by
gathered tables, x[c] * cos[pi(c)] + sign[pi(c)] * x[m(c)] * sin[pi(c)] with m(c) = pi^-1(partner(pi(c))); "pair" sorts
pairs by the norm of both scores and keeps the layout, so that only the frequencies are permuted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from bitwright.arithmetic import formats
from bitwright.core.errors import InputError

Network = TypeVar("Network", bound=nn.Module)
Layout = Literal["half", "interleaved"]
Score = Literal["weight-norm", "scaled-norm", "calibrated"]
Attention = Any  # a module with linear layers `query` and `key`
_FUSED = ("qkv", "qkv_proj", "query_key_value", "c_attn", "in_proj_weight", "Wqkv")
_NORMS = ("query_norm", "key_norm", "q_norm", "k_norm")


def partners(channels: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """The channel each channel is turned with, and the sign of that term, (channels,) each.

    "half": channels c and c + channels/2 (Hugging Face); "interleaved": 2c and 2c + 1 (RoFormer). Raises InputError for
    other layouts and odd numbers of channels.
    """
    every = torch.arange(channels)
    if channels % 2 or layout not in ("half", "interleaved"):
        raise InputError(f"Rotary positions of {channels} channels, layout {layout!r}: expected an even number, and "
                         "half or interleaved.")  # fmt: skip
    if layout == "half":
        return (every + channels // 2) % channels, torch.where(every < channels // 2, -1.0, 1.0)
    return every ^ 1, torch.where(every % 2 == 0, -1.0, 1.0)


class PermutedRotary:
    """Turns vectors whose channels are permuted: `permutation` (kv_heads, channels), entry c the original channel.

    Called as `models.decoder.rotate`, with the tables of the original channels.
    """

    def __init__(self, permutation: Tensor, layout: Layout) -> None:
        partner, sign = partners(permutation.shape[1], layout)
        self.permutation, self.layout = permutation, layout
        inverse = permutation.argsort(-1)
        self.partner = inverse.gather(-1, partner[permutation])
        self.sign = sign[permutation]

    def __call__(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """x (batch, heads, tokens, channels) turned by tables (tokens, channels); heads a multiple of kv_heads."""
        shared = x.shape[1] // self.permutation.shape[0]
        order, partner, sign = (
            each.to(x.device).repeat_interleave(shared, 0) for each in (self.permutation, self.partner, self.sign)
        )
        cosine = cosines.to(x.dtype)[:, order].transpose(0, 1)
        sine = sines.to(x.dtype)[:, order].transpose(0, 1) * sign.to(x.dtype)[:, None]
        return x * cosine + x.gather(-1, partner[None, :, None].expand(x.shape)) * sine


def sort_channels(scores: Tensor) -> Tensor:
    """Channels by descending score, ties by index: (kv_heads, channels) of the same shape."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def sort_pairs(scores: Tensor, layout: Layout) -> Tensor:
    """Like `sort_channels`, whole pairs at a time in the layout's places."""
    channels = scores.shape[-1]
    partner, _ = partners(channels, layout)
    first = torch.arange(channels)[torch.arange(channels) < partner]
    combined = (scores[:, first].square() + scores[:, partner[first]].square()).sqrt()
    chosen = first[sort_channels(combined)]
    out = torch.empty_like(scores, dtype=torch.long)
    out[:, first], out[:, partner[first]] = chosen, partner[chosen]
    return out


@dataclass(frozen=True)
class HeadShape:
    """Heads of an attention module and whether rotary positions turn them (`layout` None: no)."""

    heads: int
    kv_heads: int
    layout: Layout | None


def head_shape(attention: Attention, name: str = "attention") -> HeadShape:
    """Of a module with linear layers `query` and `key`; its own or its configuration's `heads` and `kv_heads`.

    A module with a `rotate` function has rotary positions, in the layout of its `rotary_layout` ("half"). Raises
    InputError for a norm of queries or keys, whose learned scale would have to be folded too, and for query and key
    layers that share their weight.
    """
    for norm in _NORMS:
        if getattr(attention, norm, None) is not None:
            raise InputError(f"{name} has {norm}: K-sort does not fold the learned scale of a norm of queries or keys.")
    query, key = attention.query, attention.key
    if query.weight is key.weight:
        raise InputError(f"{name}: queries and keys share one weight, which cannot be permuted for both.")
    source: Any = getattr(attention, "config", attention)
    heads = int(source.heads)
    layout: Layout | None = getattr(attention, "rotary_layout", "half") if hasattr(attention, "rotate") else None
    return HeadShape(heads, int(getattr(source, "kv_heads", heads)), layout)


def attentions(model: nn.Module) -> Iterator[tuple[str, Attention]]:
    """Modules with linear layers `query` and `key`. Raises InputError for fused projections, for a layer that is used
    twice, and for a model without any."""
    seen: set[int] = set()
    module: Any
    for name, module in model.named_modules(remove_duplicate=False):
        for fused in _FUSED:
            if getattr(module, fused, None) is not None:
                raise InputError(
                    f"{name}.{fused} holds queries, keys and values in one weight of unknown layout; split it first."
                )
        if isinstance(getattr(module, "query", None), nn.Linear) and isinstance(
            getattr(module, "key", None), nn.Linear
        ):
            if id(module.key.weight) in seen:
                raise InputError(f"{name} shares its key weights with another layer; K-sort needs its own.")
            seen.add(id(module.key.weight))
            yield name, module
    if not seen:
        raise InputError(f"{type(model).__name__} has no attention with linear layers `query` and `key`.")


def weight_scores(attention: Attention, gain: Tensor | None = None) -> Tensor:
    """Norm of every row of the key weights, times the `gain` (inputs,) of the norm before: float64 (kv_heads,
    channels)."""
    shape = head_shape(attention)
    weight: Tensor = attention.key.weight.detach().double()
    if gain is not None:
        weight = weight * gain.detach().double()
    return weight.square().sum(1).sqrt().reshape(shape.kv_heads, -1)


def input_gain(model: nn.Module, name: str) -> Tensor:
    """The learned scale (inputs,) of the norm before the attention `name`: of its neighbour `<name>_norm`.

    Raises InputError where there is none of the size of the inputs.
    """
    norm = dict(model.named_modules()).get(f"{name}_norm")
    gain = getattr(norm, "weight", None)
    attention: Attention = model.get_submodule(name)
    if not isinstance(gain, Tensor) or gain.shape != (attention.key.in_features,):
        wanted = f"{name.rpartition('.')[2]}_norm"
        raise InputError(f"{name} has no neighbour {wanted} with one scale per input of the keys.")
    return gain


def fold(attention: Attention, permutation: Tensor) -> None:
    """Permute queries and keys of `attention` in place of its layers; `permutation` (kv_heads, channels).

    Entry c names the channel that comes to place c. Weights are copied, not overwritten; folding the inverse gives them
    back bit for bit. Raises InputError for what is no permutation of each head's channels.
    """
    shape = head_shape(attention)
    channels = attention.key.out_features // shape.kv_heads
    every = torch.arange(channels)
    if permutation.shape != (shape.kv_heads, channels) or not bool((permutation.sort(-1).values == every).all()):
        raise InputError(
            f"A permutation of {channels} channels for each of {shape.kv_heads} heads asked for; got one of shape "
            f"{tuple(permutation.shape)}."
        )
    rows = permutation + channels * torch.arange(shape.kv_heads)[:, None]
    attention.key = _permuted(attention.key, rows.reshape(-1))
    shared = permutation.repeat_interleave(shape.heads // shape.kv_heads, 0)
    attention.query = _permuted(attention.query, (shared + channels * torch.arange(shape.heads)[:, None]).reshape(-1))
    if shape.layout is not None:
        before = attention.rotate
        whole = before.permutation.gather(-1, permutation) if isinstance(before, PermutedRotary) else permutation
        attention.rotate = PermutedRotary(whole, shape.layout)


def _permuted(linear: nn.Linear, rows: Tensor) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
    rows = rows.to(linear.weight.device)
    made.weight = nn.Parameter(linear.weight.detach()[rows], requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach()[rows], requires_grad=False)
    return made


@dataclass(frozen=True)
class SortedLayer:
    """One attention after K-sort: scores (kv_heads, channels) in the original order, and the permutation.

    `predicted_gain` (kv_heads,): squared block maxima of the scores summed before over after, the factor by which the
    rounding error's energy should fall.
    """

    name: str
    scores: Tensor
    permutation: Tensor
    predicted_gain: Tensor


def block_energy(scores: Tensor, block: int) -> Tensor:
    """Sum over blocks of the squared largest score: expected rounding error of (..., channels), up to a factor."""
    return scores.reshape(*scores.shape[:-1], -1, block).amax(-1).square().sum(-1)


def k_sort(
    model: Network,
    block: int,
    rope: Literal["permuted", "pair"] = "permuted",
    score: Score = "weight-norm",
    calibration: Callable[[nn.Module], Any] | None = None,
) -> tuple[Network, tuple[SortedLayer, ...]]:
    """A copy of `model` with sorted key channels, and what was done; everything but queries and keys is shared.

    Attention modules have linear layers `query` and `key`, `heads` (and `kv_heads`), and a `rotate` hook where they use
    rotary positions (`models.decoder.Attention`, `models.encoder.EncoderLayer`). `score` "scaled-norm" takes the
    learned scale of the norm before into the norm of weights; "calibrated" takes the root mean square of each key
    channel, after rotary positions, while `calibration` runs the model (`random_tokens` needs no data). Raises
    InputError for blocks that do not divide a head, other options, a missing calibration or norm, and what `attentions`
    refuses.
    """
    if rope not in ("permuted", "pair") or score not in get_args(Score):
        known = ", ".join(get_args(Score))
        raise InputError(f"K-sort with rope {rope!r} and score {score!r}: expected permuted or pair, and {known}.")
    if (score == "calibrated") != (calibration is not None):
        raise InputError("Calibrated scores, and only they, need a function that runs the model on calibration data.")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=dict(shared))
    layers = list(attentions(twin))
    measured = None if calibration is None else channel_rms(twin, calibration)
    made = []
    for name, attention in layers:
        shape = head_shape(attention, name)
        if measured is None:
            scores = weight_scores(attention, input_gain(twin, name) if score == "scaled-norm" else None)
        else:
            scores = measured[name]
        if block < 1 or scores.shape[-1] % block:
            raise InputError(f"Blocks of {block} do not divide the {scores.shape[-1]} channels of {name}.")
        paired = rope == "pair" and shape.layout is not None
        order = sort_pairs(scores, shape.layout) if paired and shape.layout else sort_channels(scores)
        fold(attention, order)
        gain = block_energy(scores, block) / block_energy(scores.gather(-1, order), block)
        made.append(SortedLayer(name, scores, order, gain))
    return twin, tuple(made)


def observe_keys(model: nn.Module, run: Callable[[nn.Module], Any], seen: Callable[[str, Tensor], None]) -> None:
    """Call `seen(name, keys)` with keys (batch, kv_heads, tokens, channels) of every attention while `run(model)`.

    Raises InputError for attention modules without an `attend` function.
    """
    hooked: list[tuple[Attention, Any]] = []

    def watched(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
            seen(name, key)
            return original(query, key, *rest, **options)

        return attend

    try:
        for name, attention in attentions(model):
            if not hasattr(attention, "attend"):
                raise InputError(f"{name} has no `attend` function through which its keys could be seen.")
            hooked.append((attention, attention.__dict__.get("attend")))
            attention.attend = watched(name, attention.attend)
        with torch.inference_mode():
            run(model)
    finally:
        for attention, before in hooked:
            del attention.attend
            if before is not None:
                attention.attend = before


def random_tokens(vocabulary: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids (1, tokens), each as likely as any other: calibration of a language model without any text."""
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


def channel_rms(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Root mean square of every key channel while `run(model)`: float64 (kv_heads, channels) by attention."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def seen(name: str, keys: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + keys.double().square().sum((0, 2))
        counts[name] = counts.get(name, 0) + keys.shape[0] * keys.shape[2]

    observe_keys(model, run, seen)
    return {name: (total / counts[name]).sqrt() for name, total in sums.items()}


def key_sqnr_db(
    model: nn.Module, format_names: Sequence[str], run: Callable[[nn.Module], Any]
) -> dict[str, dict[str, Tensor]]:
    """Signal-to-noise ratio (dB) of keys rounded to formats while `run(model)`, (kv_heads,) by format and attention."""
    forms = {name: formats.parse(name) for name in format_names}
    power: dict[str, Tensor] = {}
    noise: dict[tuple[str, str], Tensor] = {}

    def seen(name: str, keys: Tensor) -> None:
        real = keys.double()
        power[name] = power.get(name, torch.zeros(())) + real.square().sum((0, 2, 3))
        for format_name, form in forms.items():
            error = formats.fake_quantise(form, keys.float()).double() - real
            noise[format_name, name] = noise.get((format_name, name), torch.zeros(())) + error.square().sum((0, 2, 3))

    observe_keys(model, run, seen)
    return {
        each: {name: 10 * torch.log10(total / noise[each, name]) for name, total in power.items()} for each in forms
    }
