"""Linear layers on packed 4-bit weights with late dequantisation, executed by the CPU kernel.

Weights are rounded to nearest in groups along the inputs; activations are rounded to int8 with a scale per token, or
kept as floats. What a layer gives is `arithmetic.late_dequantisation.matmul` bit for bit (with int8 activations).
Source: arXiv 2411.16158.
"""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from bitwright.arithmetic.late_dequantisation import quantise_tokens, quantise_weights
from bitwright.core.errors import InputError
from bitwright.kernels.late_dequantisation import matmul, pack
from bitwright.models.replacement import refuse_joint_projections, refuse_loading, replace_module

Network = TypeVar("Network", bound=nn.Module)


class LateDequantisedLinear(nn.Module):
    """y = x @ weight^T + bias on packed weights; CPU, no gradients. Raises InputError as `quantise_weights`."""

    def __init__(
        self, layer: nn.Linear, group: int = 128, symmetric: bool = False,
        activations: Literal["int8", "float"] = "float",
    ) -> None:  # fmt: skip
        super().__init__()
        if activations not in ("int8", "float"):
            raise InputError(f"Activations are int8 or float, not {activations!r}.")
        weights = quantise_weights(layer.weight.detach().float().numpy().T, 4, group, symmetric)
        self.packed, self.activations, self.bias = pack(weights), activations, layer.bias
        refuse_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., k) -> (..., n)."""
        rows = x.detach().float().reshape(-1, x.shape[-1]).numpy()
        if self.activations == "int8":
            codes, scale = quantise_tokens(rows)
            found = matmul(codes, self.packed, scale)
        else:
            found = matmul(rows, self.packed)
        y = torch.from_numpy(found).to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def late_dequantised(
    model: Network, group: int = 128, symmetric: bool = False, activations: Literal["int8", "float"] = "float",
    keep: tuple[str, ...] = ("lm_head",),
) -> Network:  # fmt: skip
    """A copy whose linear layers, but those named in `keep` (the last part of the name), run so.

    Raises InputError for a model without such layers, for `nn.MultiheadAttention` and as `LateDequantisedLinear`.
    """
    refuse_joint_projections(model)
    twin = copy.deepcopy(model)
    layers = {name: layer for name, layer in twin.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] not in keep}
    if not chosen:
        raise InputError(f"{type(model).__name__} has no linear layers to replace.")
    for name, layer in chosen.items():
        twin = replace_module(twin, name, LateDequantisedLinear(layer, group, symmetric, activations))
    return twin
