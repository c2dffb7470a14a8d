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


def replace_attention(model: nn.Module, attention: Callable[..., Tensor], needed: str = "") -> None:
    """Put `attention`, of the signature of `scaled_dot_product_attention`, into `model` itself.

    `needed`: what reaches nothing, for the InputError that `forward` raises where the model has no attention at all.
    """
    hooked = [module for module in model.modules() if hasattr(module, "attend")]
    for module in hooked:
        module.attend = cast(Any, partial(_marked, attention))
    # bound to the module, so that a copy of it runs its own layers
    original = cast(MethodType, model.forward).__func__

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Intercept(attention) as mode:
            out = original(self, *args, **kwargs)
        if needed and not hooked and not mode.calls:
            raise InputError(
                f"{type(self).__name__} calls no scaled_dot_product_attention, so {needed} reach nothing; leave them "
                "out or give its attention module an `attend` function."
            )
        return out

    model.forward = MethodType(forward, model)
