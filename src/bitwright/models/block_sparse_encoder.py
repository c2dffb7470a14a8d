"""A BERT encoder on block-sparse int8 products, activations transposed and without padding from first to last layer.

Weights are int8 with a scale per output; activations uint8 with a scale and zero point per tensor, found on
calibration sentences. The tokens of all sentences stand side by side as columns, in groups that stay in the caches;
layer norms come with the products before them, attention runs on codes, residuals stay float32.
Source: arXiv 2306.16601.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitwright.core.errors import InputError
from bitwright.kernels.block_sparse_matmul import BlockCSR, Rounding, aligned_zeros, attention, matmul, matmul_norm
from bitwright.models.encoder import Encoder, EncoderLayer


@dataclass(frozen=True)
class _Product:
    """A linear layer on codes: y = sum * scale + bias."""

    weights: BlockCSR
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    zero_point: int

    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "bias": self.bias, "zero_point": self.zero_point}


@dataclass(frozen=True)
class _Norm:
    gain: NDArray[np.float32]
    offset: NDArray[np.float32]
    epsilon: float

    def options(self) -> dict[str, Any]:
        return {"gain": self.gain, "offset": self.offset, "epsilon": self.epsilon}


@dataclass(frozen=True)
class _Layer:
    query: _Product
    key: _Product
    value: _Product
    output: _Product
    up: _Product
    down: _Product
    attention_norm: _Norm
    feed_forward_norm: _Norm
    ranges: dict[str, Rounding]  # of x, query, key, value, mixed, middle, hidden


class BlockSparseEncoder(nn.Module):
    """An `Encoder` that runs so; takes and gives what an encoder does, without gradients.

    `density`: share of (4, 1) blocks of its linear layers that are stored. Made by `from_encoder`.
    """

    def __init__(self, encoder: Encoder, layers: Sequence[_Layer], group_tokens: int) -> None:
        super().__init__()
        self.config, self.embedding, self.positions = encoder.config, encoder.embedding, encoder.positions
        self.segments, self.norm = encoder.segments, encoder.norm
        self._layers, self._group_tokens = tuple(layers), group_tokens
        stored = [each.weights for layer in layers for each in _products(layer)]
        blocks = sum(weights.blocks for weights in stored)
        self.density = blocks / sum((len(each.start) - 1) * each.shape[1] for each in stored)
        self.weight_bytes = sum(weights.nbytes for weights in stored)

    @classmethod
    def from_encoder(
        cls, encoder: Encoder, ids: Tensor, mask: Tensor, most_fill: float = 0.5, group_tokens: int = 512
    ) -> BlockSparseEncoder:
        """Quantise an encoder: activations' ranges are those of token ids (batch, tokens) where `mask` (bool) is true.

        `most_fill` as for `BlockCSR.from_dense`. Raises InputError for empty calibration data, heads that are no
        multiple of 4 channels, weights that are not finite, and as `BlockCSR.from_dense`.
        """
        if not ids.numel() or ids.shape != mask.shape or not mask.any():
            raise InputError(
                f"Calibration needs token ids and a mask of the same shape, not {tuple(ids.shape)} and "
                f"{tuple(mask.shape)}: without them the activations have no scale."
            )
        if (encoder.config.hidden // encoder.config.heads) % 4 or group_tokens < 1:
            raise InputError("The attention kernel takes heads of multiples of 4 channels.")
        ranges = _observed(encoder, ids, mask)
        layers = [_quantised(layer, ranges[i], most_fill) for i, layer in enumerate(encoder.layers)]  # type: ignore[arg-type]
        return cls(encoder, layers, group_tokens)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (batch, tokens, hidden) as those of `Encoder`; 0 where `mask` is false."""
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        states = torch.zeros(*ids.shape, self.config.hidden)
        lengths = [int(each) for each in mask.sum(1)]
        first = 0
        while first < len(lengths):
            last, tokens = first + 1, lengths[first]
            while last < len(lengths) and tokens + lengths[last] <= self._group_tokens:
                tokens += lengths[last]
                last += 1
            if tokens:
                where = mask[first:last]
                states[first:last][where] = self._run(ids[first:last], where, lengths[first:last])
            first = last
        return states

    def _run(self, ids: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """Hidden states (tokens, hidden) of the tokens that the mask names."""
        positions = torch.arange(ids.shape[1]).expand_as(ids)[mask]
        with torch.no_grad():
            start = self.norm(self.embedding(ids[mask]) + self.positions(positions) + self.segments.weight[0])
        tokens, heads = start.shape[0], self.config.heads
        width = row_stride(tokens)
        x: Any = aligned_zeros((1, self.config.hidden, width), np.float32)
        x[0, :, :tokens] = start.detach().numpy().T
        counts = np.array([length for length in lengths if length])
        spans = np.stack([np.zeros_like(counts), np.cumsum(counts) - counts, counts], axis=1)
        first = self._layers[0].ranges["x"]
        codes: Any = aligned_zeros((1, self.config.hidden, width), np.uint8)
        codes[0, :, :tokens] = (start / first.scale).round().add(first.zero_point).clamp(0, 255).byte().numpy().T
        for at, layer in enumerate(self._layers):
            r = layer.ranges
            q, k, v = (
                matmul(each, codes, rounding=r[name], tokens=tokens, **product.options())
                for name, product in (("query", layer.query), ("key", layer.key), ("value", layer.value))
                for each in (product.weights,)
            )
            scale = r["query"].scale * r["key"].scale / (self.config.hidden // heads) ** 0.5
            mixed = attention(
                q, k, v, spans, heads, q_zero_point=r["query"].zero_point, score_scale=scale,
                value_scale=r["value"].scale, rounding=r["mixed"],
            )  # fmt: skip
            x, codes = matmul_norm(
                layer.output.weights, mixed, add=x, rounding=r["middle"], tokens=tokens, **layer.output.options(),
                **layer.attention_norm.options(),
            )  # fmt: skip
            hidden = matmul(
                layer.up.weights, codes, gelu=True, rounding=r["hidden"], tokens=tokens, **layer.up.options()
            )
            after = self._layers[at + 1].ranges["x"] if at + 1 < len(self._layers) else None
            x, codes = matmul_norm(
                layer.down.weights, hidden, add=x, rounding=after, tokens=tokens, **layer.down.options(),
                **layer.feed_forward_norm.options(),
            )  # fmt: skip
        return torch.from_numpy(np.ascontiguousarray(x[0, :, :tokens].T))


def row_stride(tokens: int) -> int:
    """Columns between rows: whole cache lines, an odd number of them, so that rows fall into all sets of a cache."""
    return (-(-tokens // 64) | 1) * 64


def _products(layer: _Layer) -> tuple[_Product, ...]:
    return layer.query, layer.key, layer.value, layer.output, layer.up, layer.down


def _observed(encoder: Encoder, ids: Tensor, mask: Tensor) -> list[dict[str, tuple[float, float]]]:
    """Least and largest value of each activation that becomes codes, per layer, over the tokens of the mask."""
    found: list[dict[str, tuple[float, float]]] = [{} for _ in encoder.layers]
    hooks = []

    def note(at: int, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
            watched = inputs[0] if name in ("x", "mixed", "middle", "hidden") else result
            values = watched[mask]
            found[at][name] = (float(values.min()), float(values.max()))

        return hook

    for at, layer in enumerate(encoder.layers):
        names = {"query": "query", "key": "key", "value": "value", "output": "mixed", "up": "middle", "down": "hidden"}
        for child, name in names.items():
            hooks.append(getattr(layer, child).register_forward_hook(note(at, name)))
        hooks.append(layer.query.register_forward_hook(note(at, "x")))  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            encoder(ids, mask)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _rounding(name: str, low: float, high: float) -> Rounding:
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"Activations {name} are not finite on the calibration data.")
    most = max(abs(low), abs(high), 1e-8)
    if name in ("key", "value"):
        return Rounding(most / 127, 0, signed=True)
    if name == "query":
        return Rounding(most / 127, 128)
    low, high = min(low, 0.0), max(high, 1e-8)
    scale = (high - low) / 255
    return Rounding(scale, int(np.clip(round(-low / scale), 0, 255)))


def _quantised(layer: EncoderLayer, ranges: dict[str, tuple[float, float]], most_fill: float) -> _Layer:
    made = {name: _rounding(name, *both) for name, both in ranges.items()}

    def product(linear: nn.Linear, source: str) -> _Product:
        weight = linear.weight.detach().float().numpy()
        if not np.isfinite(weight).all():
            raise InputError("A weight is NaN or infinite.")
        scale = np.maximum(np.abs(weight).max(1), 1e-8) / 127
        codes = np.rint(weight / scale[:, None]).astype(np.int8)
        bias = np.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float().numpy()
        packed = BlockCSR.from_dense(codes, most_fill=most_fill)
        rounding = made[source]
        return _Product(
            packed, (scale * rounding.scale).astype(np.float32), bias.astype(np.float32), rounding.zero_point
        )

    def norm(module: nn.LayerNorm) -> _Norm:
        return _Norm(module.weight.detach().numpy(), module.bias.detach().numpy(), module.eps)

    return _Layer(
        product(layer.query, "x"), product(layer.key, "x"), product(layer.value, "x"), product(layer.output, "mixed"),
        product(layer.up, "middle"), product(layer.down, "hidden"), norm(layer.attention_norm),
        norm(layer.feed_forward_norm), made,
    )  # fmt: skip
