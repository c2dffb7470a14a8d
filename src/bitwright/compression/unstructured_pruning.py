"""Pruning of single weights without a pattern, by magnitude or by weight times size of its input.

Sources: arXiv 2309.10285 (unstructured pruning of large models by magnitude); Sun et al., "A Simple and Effective
Pruning Approach for Large Language Models", arXiv 2306.11695, equation 1 (score |W| ||X||, compared within an output).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.compression.block_pruning import linear_layers
from bitwright.core.errors import InputError


def unstructured_mask(weight: Tensor, sparsity: float, input_sizes: Tensor | None = None) -> Tensor:
    """Which weights (outputs, inputs) stay, bool. Without `input_sizes` the share `sparsity` with the smallest
    magnitudes of the whole matrix goes; with them (inputs,) the share of each output with the smallest |w| * size.

    Raises InputError for shares outside of 0 to 1 and other shapes."""
    if not 0 <= sparsity <= 1 or weight.dim() != 2:
        raise InputError(f"A share {sparsity} of weights {tuple(weight.shape)} asked for; expected 0 to 1 of a matrix.")
    scores = weight.detach().abs().float()
    if input_sizes is None:
        scores = scores.reshape(1, -1)
    elif input_sizes.shape != weight.shape[1:]:
        raise InputError(f"Sizes of inputs are ({weight.shape[1]},), not {tuple(input_sizes.shape)}.")
    else:
        scores = scores * input_sizes.float()
    kept = torch.ones_like(scores, dtype=torch.bool)
    lowest = scores.argsort(dim=1, stable=True)[:, : round(sparsity * scores.shape[1])]
    return kept.scatter_(1, lowest, False).view_as(weight)


def input_sizes(model: nn.Module, *calibration: Any, keep: Sequence[str] = ()) -> dict[str, Tensor]:
    """Norm over tokens of each input of every linear layer, (inputs,) by layer name, in one call of the model; layers
    whose last name is in `keep` are left out. Raises InputError for a model without such layers."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1]).square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model, keep).items()]
    try:
        with torch.no_grad():
            model(*calibration)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


def prune_unstructured(
    model: nn.Module, sparsity: float, sizes: dict[str, Tensor] | None = None, keep: Sequence[str] = ()
) -> None:
    """Prune every linear layer but those whose last name is in `keep`, in place: by magnitude, or with `sizes` of
    `input_sizes` by weight times input. Raises InputError for layers without sizes, and as above."""
    with torch.no_grad():
        for name, layer in linear_layers(model, keep).items():
            if sizes is not None and name not in sizes:
                raise InputError(f"The calibration call did not reach layer {name}: its inputs have no sizes.")
            layer.weight.mul_(unstructured_mask(layer.weight, sparsity, None if sizes is None else sizes[name]))
