"""The integers a tensor engine would see: operands of a model's linear layers, taken while it runs on a text.

A seeded sample of rows and columns drives gate-level simulation; histograms of all values give digit statistics under
any encoding, since those depend on a value only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.models.integer import IntegerLinear


@dataclass(frozen=True)
class LayerOperands:
    """Operands of one linear layer, an (m, k) by (k, n) product of int8 codes.

    `activations` is int8 (rows, k), `weights` int8 (k, columns): the sampled tokens and output channels, in their
    order. `m`, `n`, `k` are the full sizes. The histograms count all m*k activations and k*n weights; entry i counts
    the value i - 128.
    """

    name: str
    activations: NDArray[np.int8]
    weights: NDArray[np.int8]
    m: int
    n: int
    k: int
    activation_histogram: NDArray[np.int64]
    weight_histogram: NDArray[np.int64]


def value_histogram(codes: Tensor) -> NDArray[np.int64]:
    """Counts (256,) of the values -128..127 in an int8 tensor; entry i counts the value i - 128."""
    if codes.dtype != torch.int8:
        raise InputError(f"A value histogram of {codes.dtype} asked for; expected int8 codes.")
    counts = np.bincount(codes.reshape(-1).cpu().numpy().view(np.uint8), minlength=256)
    return np.roll(counts, 128).astype(np.int64)


def linear_layers(model: nn.Module) -> dict[str, IntegerLinear]:
    """The integer linear layers of `model` by name, in the order of the modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerLinear)}


def collect_operands(
    model: nn.Module,
    ids: Tensor,
    layers: Sequence[str] | None = None,
    *,
    rows: int = 64,
    columns: int = 64,
    seed: int = 0,
) -> list[LayerOperands]:
    """Run an integer `model` once on token ids (batch, tokens) and take the operands of its linear layers.

    `layers` names the layers wanted (default all). Of each, up to `rows` tokens and `columns` output channels are
    drawn without replacement by a generator seeded with (`seed`, position of the layer); when fewer exist, all are
    taken. A layer the model applies several times counts all uses in `m` and the histograms, and gives the sample of
    the first.

    Raises UnknownNameError for a layer that does not exist, InputError for a model without integer layers or sizes
    below 1.
    """
    available = linear_layers(model)
    if not available:
        raise InputError("The model has no integer linear layers; pass it through integer_execution first.")
    if rows < 1 or columns < 1:
        raise InputError(f"A sample of {rows} rows and {columns} columns asked for; both must be 1 or more.")
    for name in layers or ():
        if name not in available:
            raise UnknownNameError("linear layer", name, available)
    wanted = set(available if layers is None else layers)
    found: dict[str, LayerOperands] = {}

    def take(name: str, position: int, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, IntegerLinear)
        codes, _ = layer.quantise_input(arguments[0])
        if name in found:
            before = found[name]
            counts = before.activation_histogram + value_histogram(codes)
            found[name] = replace(before, m=before.m + codes.shape[0], activation_histogram=counts)
        else:
            found[name] = _sample(name, layer, codes, (rows, columns), np.random.default_rng([seed, position]))

    hooks = [
        layer.register_forward_pre_hook(partial(take, name, position))
        for position, (name, layer) in enumerate(available.items())
        if name in wanted
    ]
    try:
        with torch.inference_mode():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[name] for name in available if name in found]


def _sample(
    name: str, layer: IntegerLinear, codes: Tensor, limits: tuple[int, int], generator: np.random.Generator
) -> LayerOperands:
    tokens = np.sort(generator.permutation(codes.shape[0])[: limits[0]])
    channels = np.sort(generator.permutation(layer.out_features)[: limits[1]])
    return LayerOperands(
        name=name,
        activations=codes.cpu().numpy()[tokens],
        weights=np.ascontiguousarray(layer.weight_codes.cpu().numpy()[:, channels]),
        m=codes.shape[0],
        n=layer.out_features,
        k=layer.in_features,
        activation_histogram=value_histogram(codes),
        weight_histogram=value_histogram(layer.weight_codes),
    )
