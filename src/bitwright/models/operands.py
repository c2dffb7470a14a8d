"""The words a tensor engine would see: operands of a model's linear layers, taken while it runs on a text.

A seeded sample of rows and columns drives gate-level simulation. Of INT8 operands, histograms of all values give digit
statistics under any encoding, since those depend on a value only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitwright.arithmetic import formats
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.format_products import operand_words
from bitwright.models.format_execution import FormatAssignment, execute_in
from bitwright.models.integer import IntegerLinear


@dataclass(frozen=True)
class LayerOperands:
    """Operands of one linear layer, an (m, k) by (k, n) product of codes.

    `activations` (rows, k) and `weights` (k, columns) are those of the sampled tokens and output channels, in their
    order: int8 codes, or int16 words of other formats. `m`, `n`, `k` are the full sizes. The histograms count all m*k
    INT8 activations and k*n weights, entry i the value i - 128; operands of other formats have none.
    """

    name: str
    activations: NDArray[np.integer[Any]]
    weights: NDArray[np.integer[Any]]
    m: int
    n: int
    k: int
    activation_histogram: NDArray[np.int64] | None = None
    weight_histogram: NDArray[np.int64] | None = None


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
            assert before.activation_histogram is not None
            counts = before.activation_histogram + value_histogram(codes)
            found[name] = replace(before, m=before.m + codes.shape[0], activation_histogram=counts)
            return
        tokens, channels = _sample((codes.shape[0], layer.out_features), (rows, columns), [seed, position])
        found[name] = LayerOperands(
            name=name,
            activations=codes.cpu().numpy()[tokens],
            weights=np.ascontiguousarray(layer.weight_codes.cpu().numpy()[:, channels]),
            m=codes.shape[0],
            n=layer.out_features,
            k=layer.in_features,
            activation_histogram=value_histogram(codes),
            weight_histogram=value_histogram(layer.weight_codes),
        )

    places = [(name, layer, place) for place, (name, layer) in enumerate(available.items()) if name in wanted]
    _run_with_hooks(model, ids, {layer: partial(take, name, place) for name, layer, place in places})
    return [found[name] for name in available if name in found]


def collect_words(
    model: nn.Module, assignment: FormatAssignment, ids: Tensor, *, rows: int = 64, columns: int = 64, seed: int = 0
) -> list[LayerOperands]:
    """Run `model` once in the formats of `assignment` and take the operands of its linear layers as hardware words.

    Samples as `collect_operands`; a layer that is applied several times gives those of its first use. Raises InputError
    when weights or activations have no format, or one that is no operand of a hardware product.
    """
    if assignment.weights is None or assignment.activations is None:
        raise InputError(f"Words of both operands asked for; the assignment is: {assignment.name}.")
    forms = formats.parse(assignment.activations), formats.parse(assignment.weights)
    plain = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    twin = execute_in(model, assignment)
    found: dict[str, LayerOperands] = {}

    def take(name: str, position: int, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        given = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
        if name in found:
            found[name] = replace(found[name], m=found[name].m + given.shape[0])
            return
        n, k = plain[name].weight.shape
        tokens, channels = _sample((given.shape[0], n), (rows, columns), [seed, position])
        left = operand_words(forms[0], forms[0].encode(given))[tokens, :k]
        right = operand_words(forms[1], forms[1].encode(plain[name].weight.float()))[channels, :k]
        found[name] = LayerOperands(
            name, left.astype(np.int16), np.ascontiguousarray(right.T.astype(np.int16)), given.shape[0], n, k
        )

    _run_with_hooks(
        twin, ids, {twin.get_submodule(name): partial(take, name, position) for position, name in enumerate(plain)}
    )
    return [found[name] for name in plain if name in found]


def _run_with_hooks(model: nn.Module, ids: Tensor, takes: Mapping[nn.Module, Callable[..., None]]) -> None:
    hooks = [layer.register_forward_pre_hook(take) for layer, take in takes.items()]
    try:
        with torch.inference_mode():
            model(ids)
    finally:
        for hook in hooks:
            hook.remove()


def _sample(
    sizes: tuple[int, int], limits: tuple[int, int], seed: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which tokens and output channels are taken, each up to its limit, in their order."""
    generator = np.random.default_rng(seed)
    tokens, channels = (np.sort(generator.permutation(size)[:limit]) for size, limit in zip(sizes, limits, strict=True))
    return tokens, channels
