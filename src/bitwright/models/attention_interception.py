"""Another attention in the place of `scaled_dot_product_attention`, in models that know nothing of it.

Modules with an `attend` function get the other one there. Calls of torch's function anywhere else inside `forward` are
intercepted, so that a model with attention of both kinds runs in one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bitwright.core.errors import InputError

# Whether the other attention runs: torch's function, called from inside it, is meant as it is.
_inside: ContextVar[bool] = ContextVar("inside the other attention", default=False)


def _marked(attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    token = _inside.set(True)
    try:
        return attention(*args, **kwargs)
    finally:
        _inside.reset(token)


class _Intercept(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` go to `attention`; `calls` counts them."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attention, self.calls = attention, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention and not _inside.get():
            self.calls += 1
            return _marked(self.attention, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attention_arguments(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor | None, float]:  # fmt: skip
    """The mask (None, boolean or added), causal order included, and the scale of what torch's function was asked for.

    `query` (batch, heads, queries, channels), `key` (batch, kv_heads, keys, channels). Raises InputError for dropout
    and for heads that are no multiple of kv_heads.
    """
    if dropout_p:
        raise InputError("Converted models run in evaluation mode; attention with dropout was asked for.")
    heads, kv_heads = query.shape[1], key.shape[1]
    if (heads != kv_heads and not enable_gqa) or heads % kv_heads:
        raise InputError(f"Attention of {heads} heads over {kv_heads} key-value heads asked for; expected a multiple.")
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    return attn_mask, query.shape[-1] ** -0.5 if scale is None else scale


def replace_attention(model: nn.Module, attention: Callable[..., Tensor], needed: str = "") -> None:
    """Put `attention`, of the signature of `scaled_dot_product_attention`, into `model` itself, in the place of one put
    there before.

    `needed`: what reaches nothing, for the InputError that `forward` raises where the model has no attention at all.
    """
    hooked = [module for module in model.modules() if hasattr(module, "attend")]
    for module in hooked:
        module.attend = cast(Any, partial(_marked, attention))
    required = needed and not hooked
    # not bound, so that a copy of the model runs its own layers
    current = cast(MethodType, model.forward).__func__
    original = getattr(current, "without_interception", current)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Intercept(attention) as mode:
            out = original(self, *args, **kwargs)
        if required and not mode.calls:
            raise InputError(
                f"{type(self).__name__} calls no scaled_dot_product_attention, so {needed} reach nothing; leave them "
                "out or give its attention module an `attend` function."
            )
        return out

    forward.without_interception = original  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)
