"""Putting one layer of a network in the place of another, for all conversions of models."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn

from bitwright.core.errors import InputError

Network = TypeVar("Network", bound=nn.Module)


def replace_module(root: Network, name: str, made: nn.Module) -> Network:
    """`root` with `made` wherever its module `name` is registered, under other names too; `made` itself for ""."""
    old = root.get_submodule(name)
    if old is root:
        return cast(Network, made)
    for module in list(root.modules()):
        for child, each in list(module._modules.items()):
            if each is old:
                setattr(module, child, made)
    return root


def refuse_joint_projections(model: nn.Module) -> None:
    """Raise InputError for `nn.MultiheadAttention`: its projections are one parameter, which it multiplies itself, so
    that no conversion of linear layers reaches them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise InputError(
                f"{name or 'The model'} is nn.MultiheadAttention, whose projections are not linear layers; write it "
                "with nn.Linear."
            )


def refuse_loading(module: nn.Module) -> None:
    """Make `load_state_dict` raise InputError: for layers whose converted weights are not part of their state."""
    module.register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]


def _refuse(module: nn.Module, *_: Any) -> None:
    raise InputError(
        f"{type(module).__name__} keeps its converted weights outside its state; load the original and convert it."
    )
