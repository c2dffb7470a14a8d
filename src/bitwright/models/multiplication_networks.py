"""Layers of DeiT-T, DeiT-B, PVTv1-T and PVTv2-B0 with the primitive that computes each of their products. Shapes only.

`network_layers` gives them as trained (softmax attention, with the spatial reduction of keys in the pyramid networks)
or converted as ShiftAddViT does: linear attention over all tokens, its products multiplied or added, and linear layers
that multiply, shift, or split tokens between the two. Layers without products (softmax, normalisation, activations) are
left out. Token counts are raised to the next number with no prime factor above 7, so that they tile: 197 to 200.

Sources: Touvron et al. 2021 (DeiT); Wang et al. 2021 and 2022 (PVT, PVTv2); arXiv 2306.06446 (the conversion).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.operators import Operand, convolution, product
from bitwright.core.workload import Operator, Role

Primitive = Literal["multiply", "add", "shift"]
Attention = Literal["original", "softmax", "linear", "additive"]
Linear = Literal["multiply", "shift", "mixture"]
Part = Literal["embedding", "projections", "attention", "mlp", "head"]


@dataclass(frozen=True)
class Stage:
    """Blocks of one resolution: tokens as (height, width), the convolution that makes them as (inputs, kernel, stride).

    `reduction`: keys and values come from tokens merged in squares of that side; `depthwise`: a 3 x 3 convolution
    inside the MLP.
    """

    width: int
    heads: int
    ratio: int
    depth: int
    tokens: tuple[int, int]
    patch: tuple[int, int, int]
    reduction: int = 1
    depthwise: bool = False


def _pyramid(widths: tuple[int, ...], first: int, kernels: tuple[int, ...], depthwise: bool) -> tuple[Stage, ...]:
    inputs, sides, strides = (3, *widths[:-1]), (56, 28, 14, 7), (first, 2, 2, 2)
    return tuple(
        Stage(width, heads, ratio, 2, (side, side), (before, kernel, stride), reduction, depthwise)
        for width, heads, ratio, side, before, kernel, stride, reduction in zip(
            widths, (1, 2, 5, 8), (8, 8, 4, 4), sides, inputs, kernels, strides, (8, 4, 2, 1), strict=True
        )
    )


NETWORKS: Mapping[str, tuple[Stage, ...]] = {
    "DeiT-T": (Stage(192, 3, 4, 12, (1, 200), (3, 16, 16)),),  # 196 patches and a class token
    "DeiT-B": (Stage(768, 12, 4, 12, (1, 200), (3, 16, 16)),),
    "PVTv1-T": _pyramid((64, 128, 320, 512), 4, (4, 2, 2, 2), False),
    "PVTv2-B0": _pyramid((32, 64, 160, 256), 4, (7, 3, 3, 3), True),
}


@dataclass(frozen=True)
class Layer:
    """A product or convolution, the primitive that computes it, and how often the network runs it."""

    name: str
    part: Part
    primitive: Primitive
    operator: Operator
    count: int = 1

    @property
    def terms(self) -> float:
        """Multiplications, shifts or additions of values, over all runs."""
        return self.count * self.operator.macs


def tileable(count: int) -> int:
    """The next number, from `count` on, without a prime factor above 7."""
    while True:
        rest = count
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return count
        count += 1


def product_layer(
    name: str, part: Part, primitive: Primitive, batch: int, m: int, n: int, k: int, count: int, weights: bool = True
) -> Layer:
    """`batch` products (m, k) by (k, n), run `count` times; the second operand is weights, or activations (codes)."""
    left = Operand(f"{name}.in", (batch, m, k) if batch > 1 else (m, k))
    right = Operand(f"{name}.weight", (batch, k, n) if batch > 1 else (k, n),
                    role=Role.WEIGHT if weights else Role.ACTIVATION)  # fmt: skip
    out = Operand(f"{name}.out", (batch, m, n) if batch > 1 else (m, n))
    return Layer(name, part, primitive, product(name, left, right, out, batch, m, n, k), count)


def network_layers(
    network: str, attention: Attention = "original", projections: Linear = "multiply", mlp: Linear = "multiply",
    shift_share: float = 0.6, classes: int = 1000,
) -> tuple[Layer, ...]:  # fmt: skip
    """Layers for one image of 224 x 224.

    `attention` "original" is that of the trained network, "softmax" without spatial reduction, "linear" and "additive"
    K^T V first, multiplied or added. Mixtures send `shift_share` of the tokens to shifts; their routers multiply.
    Raises UnknownNameError for other names, InputError for shares outside 0 to 1.
    """
    if network not in NETWORKS:
        raise UnknownNameError("network", network, NETWORKS)
    if attention not in get_args(Attention):
        raise UnknownNameError("attention", attention, get_args(Attention))
    for linear in (projections, mlp):
        if linear not in get_args(Linear):
            raise UnknownNameError("primitive of linear layers", linear, get_args(Linear))
    if not 0 <= shift_share <= 1:
        raise InputError(f"A share of {shift_share} of the tokens shifts; expected 0 to 1.")
    found: list[Layer] = []
    for index, stage in enumerate(NETWORKS[network]):
        name, tokens = f"stages.{index}", tileable(stage.tokens[0] * stage.tokens[1])
        reduction = stage.reduction if attention == "original" else 1
        found.append(_embedding(name, stage))
        found += _attention(name, stage, attention, tokens, reduction)
        for part, inputs, outputs, rows in _projections(stage, tokens, reduction):
            found += _linear(f"{name}.{part}", "projections", projections, rows, inputs, outputs, stage, shift_share)
        inner = stage.width * stage.ratio
        found += _linear(f"{name}.up", "mlp", mlp, tokens, stage.width, inner, stage, shift_share)
        found += _linear(f"{name}.down", "mlp", mlp, tokens, inner, stage.width, stage, shift_share)
        if stage.depthwise:
            found.append(_convolution(f"{name}.depthwise", "mlp", inner, inner, stage.tokens, 3, 1, inner, stage.depth))
    found.append(product_layer("head", "head", "multiply", 1, 1, classes, NETWORKS[network][-1].width, 1))
    return tuple(found)


def _projections(stage: Stage, tokens: int, reduction: int) -> list[tuple[str, int, int, int]]:
    width = stage.width
    keys = tileable(tokens // reduction**2)
    inner = [("query_key_value", 3 * width, tokens)] if reduction == 1 else [
        ("query", width, tokens), ("key_value", 2 * width, keys)]  # fmt: skip
    return [(part, width, outputs, rows) for part, outputs, rows in (*inner, ("output", width, tokens))]


def _attention(name: str, stage: Stage, attention: Attention, tokens: int, reduction: int) -> list[Layer]:
    """Products of activations, the reduction of keys, and the depthwise convolution over tokens of linear attention."""
    depth, heads, runs = stage.width // stage.heads, stage.heads, stage.depth
    keys = tileable(tokens // reduction**2)
    found = []
    if attention in ("original", "softmax"):
        if reduction > 1:
            side = (stage.tokens[0] // reduction, stage.tokens[1] // reduction)
            found.append(_convolution(f"{name}.reduction", "attention", stage.width, stage.width, side, reduction,
                                      reduction, 1, runs))  # fmt: skip
        shapes = (("scores", tokens, keys, depth), ("context", tokens, depth, keys))
        return found + [product_layer(f"{name}.{part}", "attention", "multiply", heads, m, n, k, runs, False)
                        for part, m, n, k in shapes]  # fmt: skip
    primitive: Primitive = "add" if attention == "additive" else "multiply"
    # the binary operand is the second one: K of (K^T V)^T = V^T K, Q^T of (Q (K^T V))^T
    for part, m, n, k in (("keys_values", depth, depth, tokens), ("queries", depth, tokens, depth)):
        found.append(product_layer(f"{name}.{part}", "attention", primitive, heads, m, n, k, runs, False))
    data = Operand(f"{name}.values", (1, heads, tokens, depth))
    weight = Operand(f"{name}.neighbours.weight", (heads, 1, 9, 1), role=Role.WEIGHT)
    out = Operand(f"{name}.neighbours.out", data.shape)
    found.append(Layer(f"{name}.neighbours", "attention", "multiply",
                       convolution(f"{name}.neighbours", data, weight, out, [1, 1], [1, 1], heads), runs))  # fmt: skip
    return found


def _convolution(
    name: str, part: Part, inputs: int, outputs: int, side: tuple[int, int], kernel: int, stride: int, groups: int,
    count: int,
) -> Layer:  # fmt: skip
    data = Operand(f"{name}.in", (1, inputs, side[0] * stride, side[1] * stride))
    weight = Operand(f"{name}.weight", (outputs, inputs // groups, kernel, kernel), role=Role.WEIGHT)
    made = convolution(name, data, weight, Operand(f"{name}.out", (1, outputs, *side)), [stride] * 2, [1, 1], groups)
    return Layer(name, part, "multiply", made, count)


def _embedding(name: str, stage: Stage) -> Layer:
    inputs, kernel, stride = stage.patch
    if kernel == stride:  # patches that do not overlap: a product
        tokens = tileable(stage.tokens[0] * stage.tokens[1])
        return product_layer(
            f"{name}.embedding", "embedding", "multiply", 1, tokens, stage.width, inputs * kernel**2, 1
        )
    return _convolution(f"{name}.embedding", "embedding", inputs, stage.width, stage.tokens, kernel, stride, 1, 1)


def _linear(
    name: str, part: Part, kind: Linear, rows: int, inputs: int, outputs: int, stage: Stage, shift_share: float
) -> list[Layer]:
    if kind != "mixture":
        return [product_layer(name, part, kind, 1, rows, outputs, inputs, stage.depth)]
    found = [product_layer(f"{name}.router", part, "multiply", 1, rows, 2, inputs, stage.depth)]
    shares: tuple[tuple[Primitive, float], ...] = (("multiply", 1 - shift_share), ("shift", shift_share))
    for primitive, share in shares:
        if round(rows * share):
            taken = tileable(round(rows * share))
            found.append(product_layer(f"{name}.{primitive}", part, primitive, 1, taken, outputs, inputs, stage.depth))
    return found
