"""A decoder on the native attention kernels: prompts in tiles, steps of one token by any partition of the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from bitwright.core.errors import UnknownNameError
from bitwright.kernels.attention import flash
from bitwright.kernels.attention_partition import SCHEDULES
from bitwright.kernels.decode_attention import decode_attention
from bitwright.models.decoder import Attention, Decoder


def _attend(schedule: str, threads: int | None) -> Callable[..., Tensor]:
    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if attn_mask is None and query.shape[2] > 1:
            rows = (each.transpose(1, 2) for each in (query, key, value))
            mixed: Tensor = flash(*rows, causal=is_causal, threads=threads)
            return mixed.transpose(1, 2)
        if attn_mask is not None:  # several tokens after a cache that is not empty
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa
            )
        out: Tensor = decode_attention(query[:, :, 0], key, value, schedule=schedule, threads=threads)
        return out[:, :, None]

    return attend


def partitioned_decoding(model: Decoder, schedule: str = "lean", threads: int | None = None) -> Decoder:
    """`model` with the same weights, whose prompts use `kernels.attention.flash` and steps of one token
    `kernels.decode_attention`. Raises UnknownNameError for a schedule that is not "lean", "fixed" or "whole"."""
    if schedule not in SCHEDULES:
        raise UnknownNameError("schedule", schedule, SCHEDULES)
    # Parameters are shared, not copied.
    changed = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in changed.modules():
        if isinstance(module, Attention):
            module.attend = _attend(schedule, threads)
    return changed
