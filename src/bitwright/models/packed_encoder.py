"""A BERT encoder that computes real tokens only: packed once, every operator on packed rows, padded again at the end.

Source: arXiv 2210.03052 (the layer's seven steps); Devlin et al., "BERT" (2019), section 3, for the network.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from bitwright.core.errors import InputError
from bitwright.kernels.packed_sequences import Packing, attention, bias_gelu_, packing, residual_norm
from bitwright.models.encoder import Encoder, EncoderLayer


class PackedEncoder:
    """The weights of an `Encoder`, queries, keys and values side by side; float32, on the CPU, for inference."""

    def __init__(self, encoder: Encoder) -> None:
        if encoder.embedding.weight.dtype != torch.float32 or encoder.embedding.weight.device.type != "cpu":
            raise InputError("The packed encoder takes float32 weights on the CPU; convert the model first.")
        self.encoder, self.config = encoder, encoder.config
        layers = [layer for layer in encoder.layers if isinstance(layer, EncoderLayer)]
        self.projections = [
            (
                torch.cat([each.weight.detach() for each in (layer.query, layer.key, layer.value)]),
                torch.cat([each.bias.detach() for each in (layer.query, layer.key, layer.value)]),
            )
            for layer in layers
        ]
        self.layers = layers

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden) of ids (batch, tokens), 0 where `mask` (bool, same shape) is false.

        Raises InputError for a mask of another shape or type, and more tokens than the model has positions.
        """
        real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask
        if real.shape != ids.shape:
            raise InputError(f"A mask {tuple(real.shape)} does not fit ids {tuple(ids.shape)}.")
        if ids.shape[1] > self.config.max_positions:
            raise InputError(f"{ids.shape[1]} tokens given; the model has {self.config.max_positions} positions.")
        plan = packing(real)
        with torch.inference_mode():
            return self._run(ids, plan)

    def _run(self, ids: torch.Tensor, plan: Packing) -> torch.Tensor:
        encoder, config = self.encoder, self.config
        places = plan.index % plan.longest if plan.longest else plan.index
        x = encoder.embedding(ids.reshape(-1)[plan.index]) + encoder.positions(places) + encoder.segments.weight[0]
        x = encoder.norm(x)
        heads, width = config.heads, config.hidden
        for number, (layer, (weight, bias)) in enumerate(zip(self.layers, self.projections, strict=True)):
            last = number + 1 == len(self.layers)
            qkv = functional.linear(x, weight, bias).view(-1, 3, heads, width // heads)
            mixed = attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], plan.offsets).reshape(-1, width)
            norm = layer.attention_norm
            x = residual_norm(mixed @ layer.output.weight.T, layer.output.bias, x, norm.weight, norm.bias, norm.eps)
            inner = bias_gelu_(x @ layer.up.weight.T, layer.up.bias)
            norm = layer.feed_forward_norm
            x = residual_norm(
                inner @ layer.down.weight.T, layer.down.bias, x, norm.weight, norm.bias, norm.eps,
                plan if last else None,
            )  # fmt: skip
        return x if self.layers else plan.unpack(x)
