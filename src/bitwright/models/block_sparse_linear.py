"""Linear layers on block-sparse int8 weights in any network, as an operator of PyTorch that `torch.export` understands.

Inputs become uint8 codes of a calibrated scale and zero point, rows become columns for the kernel and back: a network
that keeps its activations transposed, `models.block_sparse_encoder`, saves that. Source: arXiv 2306.16601.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.core.errors import InputError
from bitwright.kernels.block_sparse_matmul import BlockCSR, Rounding, matmul
from bitwright.models.replacement import replace_module

Network = TypeVar("Network", bound=nn.Module)


@torch.library.custom_op("bitwright::block_sparse_linear", mutates_args=())
def block_sparse_linear(
    x: Tensor, start: Tensor, index: Tensor, value: Tensor, sums: Tensor, scale: Tensor, bias: Tensor,
    input_scale: float, input_zero: int,
) -> Tensor:  # fmt: skip
    """y (..., outputs) float32 of x (..., inputs): codes of x by the weights of a `BlockCSR` (index as int16 bits)."""
    rows = x.detach().reshape(-1, x.shape[-1]).float().t().contiguous()
    codes = (rows / input_scale).round_().add_(input_zero).clamp_(0, 255).to(torch.uint8)
    weights = BlockCSR(
        (len(scale), x.shape[-1]), start.numpy(), index.numpy().view(np.uint16), value.numpy(), sums.numpy(), 0
    )
    y = matmul(weights, codes.numpy(), scale=scale.numpy(), bias=bias.numpy(), zero_point=input_zero)
    return torch.from_numpy(y).t().contiguous().view(*x.shape[:-1], len(scale)).to(x.dtype)


@block_sparse_linear.register_fake
def _(
    x: Tensor, start: Tensor, index: Tensor, value: Tensor, sums: Tensor, scale: Tensor, bias: Tensor,
    input_scale: float, input_zero: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, start, index, value, _, scale, _, input_scale, _ = inputs
    ctx.save_for_backward(start, index, value, scale)
    ctx.inputs, ctx.input_scale = x.shape[-1], input_scale


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding: dy / dx are the weights."""
    start, index, value, scale = ctx.saved_tensors
    sums, shape = np.zeros(0, np.int64), (len(scale), ctx.inputs)
    packed = BlockCSR(shape, start.numpy(), index.numpy().view(np.uint16), value.numpy(), sums, 0)
    dense = torch.from_numpy(packed.to_dense()).float() * (scale / ctx.input_scale)[:, None]
    return (gradient @ dense.to(gradient.dtype), *(None,) * 8)


block_sparse_linear.register_autograd(_backward, setup_context=_keep)


class BlockSparseLinear(nn.Module):
    """y = x W^T + bias of a linear layer whose weights were pruned in (4, 1) blocks, in int8; x on the CPU.

    `low` and `high`: range of the inputs. Raises InputError as `BlockCSR.from_dense`, and for ranges and weights that
    are not finite."""

    def __init__(self, layer: nn.Linear, low: float, high: float, most_fill: float = 0.5) -> None:
        super().__init__()
        weight = layer.weight.detach().float().numpy()
        if not (np.isfinite(weight).all() and np.isfinite([low, high]).all() and low <= high):
            raise InputError(f"Weights, or the inputs' range {low} to {high}, are not finite numbers in order.")
        low, high = min(low, 0.0), max(high, 1e-8)
        step = (high - low) / 255
        self.rounding = Rounding(step, int(np.clip(round(-low / step), 0, 255)))
        own = np.maximum(np.abs(weight).max(1), 1e-8) / 127
        packed = BlockCSR.from_dense(np.rint(weight / own[:, None]).astype(np.int8), most_fill=most_fill)
        self.density, self.in_features, self.out_features = packed.density, layer.in_features, layer.out_features
        bias = torch.zeros(len(own)) if layer.bias is None else layer.bias.detach().float().clone()
        for name, values in (
            ("start", packed.start), ("index", packed.index.view(np.int16)), ("value", packed.value),
            ("sums", packed.sums), ("scale", (own * step).astype(np.float32)), ("bias", bias.numpy()),
        ):  # fmt: skip
            self.register_buffer(name, torch.from_numpy(values))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        y: Tensor = block_sparse_linear(
            x, self.start, self.index, self.value, self.sums, self.scale, self.bias, self.rounding.scale,
            self.rounding.zero_point,
        )  # fmt: skip
        return y


def on_block_sparse_products(
    model: Network, *calibration: Any, keep: tuple[str, ...] = (), most_fill: float = 0.5
) -> Network:
    """A copy whose linear layers, but those whose last name is in `keep`, run so. `calibration`: arguments of one call
    of the model, from which the ranges of inputs come. Raises InputError for a model without such layers, one that this
    call does not reach, and as `BlockSparseLinear`."""
    twin = copy.deepcopy(model)
    ranges: dict[str, tuple[float, float]] = {}
    chosen = {
        name: layer
        for name, layer in twin.named_modules()
        if isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] not in keep
    }
    if not chosen:
        raise InputError(f"{type(model).__name__} has no linear layers to replace.")

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = (float(each) for each in inputs[0].aminmax())
            before = ranges.get(name, (low, high))
            ranges[name] = (min(low, before[0]), max(high, before[1]))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in chosen.items()]
    try:
        with torch.no_grad():
            twin(*calibration)
    finally:
        for handle in hooks:
            handle.remove()
    for name, layer in chosen.items():
        if name not in ranges:
            raise InputError(f"The calibration call does not reach layer {name}: its inputs have no scale.")
        twin = replace_module(twin, name, BlockSparseLinear(layer, *ranges[name], most_fill))
    return twin
