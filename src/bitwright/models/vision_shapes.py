"""Shapes of published vision networks as workloads: MobileNetV3-Large and MobileViT-S. Shapes only, no weights.

Batch normalisation is folded into the convolutions (their bias). Sources: Howard et al., "Searching for MobileNetV3"
(2019), table 1; Mehta and Rastegari, "MobileViT" (2022), section 3 and appendix A (MobileViT-S), apple/mobilevit-small
config.json.
"""

from __future__ import annotations

from bitwright.core.errors import InputError
from bitwright.core.operators import (
    ACTIVATION_FLOPS,
    LAYER_NORM_FLOPS,
    Operand,
    attention,
    convolution,
    pointwise,
    product,
)
from bitwright.core.workload import Kind, Operator, Role, Workload

# kernel, expansion, output channels, squeeze-and-excite, activation, stride
_MOBILENET_V3_LARGE: tuple[tuple[int, int, int, bool, str, int], ...] = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2), (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2), (5, 120, 40, True, "relu", 1), (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2), (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1), (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1), (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2), (5, 960, 160, True, "hardswish", 1), (5, 960, 160, True, "hardswish", 1),
)  # fmt: skip


def mobilenet_v3_large(batch: int = 1, image: int = 224) -> Workload:
    """MobileNetV3-Large (width 1.0, 1000 classes). Operators: stem, blocks.<i>.expand|depthwise|project, head.

    Raises InputError for a batch below 1 or an image side below 32.
    """
    net = _Convolutions(batch, image)
    state = net.conv("stem", net.image(), 16, 3, 2, "hardswish")
    for index, (kernel, expansion, outputs, excite, activation, stride) in enumerate(_MOBILENET_V3_LARGE):
        name, before = f"blocks.{index}", state
        if expansion != state.shape[1]:
            state = net.conv(f"{name}.expand", state, expansion, 1, 1, activation)
        state = net.conv(f"{name}.depthwise", state, expansion, kernel, stride, activation, groups=expansion)
        if excite:
            state = net.squeeze_excite(name, state, _rounded(expansion / 4))
        state = net.conv(f"{name}.project", state, outputs, 1, 1)
        if state.shape == before.shape:
            state = net.add(f"{name}.residual", before, state)
    state = net.conv("last", state, 960, 1, 1, "hardswish")
    state = net.linear("head.hidden", net.pool("pool", state), 1280, "hardswish")
    net.linear("head", state, 1000)
    return Workload("mobilenet-v3-large", tuple(net.operators), (f"Batch {batch}, image {image}x{image}.",))


def mobilevit_s(batch: int = 1, image: int = 256) -> Workload:
    """MobileViT-S (1000 classes). Attention runs within each of the four pixel places of the 2x2 patches.

    Raises InputError for a batch below 1 or an image side that is not a multiple of 64.
    """
    if image % 64:
        raise InputError(f"MobileViT-S halves an image five times into 2x2 patches: side {image} is no multiple of 64.")
    net = _Convolutions(batch, image)
    state = net.conv("stem", net.image(), 16, 3, 2, "silu")
    state = net.inverted_residual("stages.0.0", state, 32, 1)
    for index, stride in enumerate((2, 1, 1)):
        state = net.inverted_residual(f"stages.1.{index}", state, 64, stride)
    for stage, (outputs, hidden, layers) in enumerate(((96, 144, 2), (128, 192, 4), (160, 240, 3)), start=2):
        state = net.inverted_residual(f"stages.{stage}.0", state, outputs, 2)
        state = net.mobilevit_block(f"stages.{stage}.1", state, hidden, layers)
    state = net.conv("last", state, 640, 1, 1, "silu")
    net.linear("head", net.pool("pool", state), 1000)
    return Workload("mobilevit-s", tuple(net.operators), (f"Batch {batch}, image {image}x{image}.",))


def _rounded(channels: float) -> int:
    """The multiple of 8 next to `channels`, not more than a tenth below it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class _Convolutions:
    """Appends operators; feature maps are (batch, channels, height, width)."""

    def __init__(self, batch: int, image: int) -> None:
        if batch < 1 or image < 32:
            raise InputError(f"A batch of {batch} images of side {image} asked for; expected at least 1 and 32.")
        self.batch, self.side = batch, image
        self.operators: list[Operator] = []

    def image(self) -> Operand:
        return Operand("image", (self.batch, 3, self.side, self.side), "int8")

    def activation(self, name: str, data: Operand, function: str) -> Operand:
        out = Operand(f"{name}.{function}.out", data.shape, "int8")
        flops = ACTIVATION_FLOPS.get(function, 1.0)
        self.operators.append(
            pointwise(f"{name}.{function}", Kind.ELEMENTWISE, (data,), (out,), out.shape, flops, target=function)
        )
        return out

    def conv(
        self, name: str, data: Operand, outputs: int, kernel: int, stride: int, activation: str = "", groups: int = 1,
        bias: bool = True,
    ) -> Operand:  # fmt: skip
        batch, inputs, *space = data.shape
        weight = Operand(f"{name}.weight", (outputs, inputs // groups, kernel, kernel), "int8", Role.WEIGHT)
        extra = [Operand(f"{name}.bias", (outputs,), "int32", Role.WEIGHT)] if bias else []
        out = Operand(f"{name}.out", (batch, outputs, *(-(-side // stride) for side in space)), "int8")
        self.operators.append(
            convolution(name, data, weight, out, [stride] * 2, [1, 1], groups, extra=extra, target="convolution")
        )
        return self.activation(name, out, activation) if activation else out

    def linear(self, name: str, data: Operand, outputs: int, activation: str = "") -> Operand:
        rows, inputs = data.shape
        weight = Operand(f"{name}.weight", (inputs, outputs), "int8", Role.WEIGHT)
        bias = Operand(f"{name}.bias", (outputs,), "int32", Role.WEIGHT)
        out = Operand(f"{name}.out", (rows, outputs), "int8")
        self.operators.append(product(name, data, weight, out, 1, rows, outputs, inputs, extra=[bias], target="linear"))
        return self.activation(name, out, activation) if activation else out

    def add(self, name: str, left: Operand, right: Operand) -> Operand:
        out = Operand(f"{name}.out", left.shape, "int8")
        self.operators.append(pointwise(name, Kind.ELEMENTWISE, (left, right), (out,), out.shape, 1.0, target="add"))
        return out

    def pool(self, name: str, data: Operand) -> Operand:
        out = Operand(f"{name}.out", data.shape[:2], "int8")
        self.operators.append(
            pointwise(name, Kind.REDUCTION, (data,), (out,), data.shape, 1.0, reduced=(2, 3), target="mean")
        )
        return out

    def squeeze_excite(self, name: str, data: Operand, squeezed: int) -> Operand:
        pooled = self.pool(f"{name}.squeeze", data)
        gate = self.linear(f"{name}.squeeze.reduce", pooled, squeezed, "relu")
        gate = self.linear(f"{name}.squeeze.expand", gate, data.shape[1], "hardsigmoid")
        out = Operand(f"{name}.squeeze.scale.out", data.shape, "int8")
        wide = Operand(gate.name, (*gate.shape, 1, 1), "int8")
        self.operators.append(
            pointwise(
                f"{name}.squeeze.scale", Kind.ELEMENTWISE, (data, wide), (out,), out.shape, 1.0, target="multiply"
            )
        )
        return out

    def inverted_residual(self, name: str, data: Operand, outputs: int, stride: int) -> Operand:
        wide = 4 * data.shape[1]
        state = self.conv(f"{name}.expand", data, wide, 1, 1, "silu")
        state = self.conv(f"{name}.depthwise", state, wide, 3, stride, "silu", groups=wide)
        state = self.conv(f"{name}.project", state, outputs, 1, 1)
        return self.add(f"{name}.residual", data, state) if state.shape == data.shape else state

    def norm(self, name: str, data: Operand) -> Operand:
        out = Operand(f"{name}.out", data.shape, "int8")
        parts = [Operand(f"{name}.{part}", data.shape[1:], "int32", Role.WEIGHT) for part in ("weight", "bias")]
        self.operators.append(
            pointwise(
                name, Kind.NORMALISATION, (data, *parts), (out,), out.shape, LAYER_NORM_FLOPS, target="layer_norm"
            )
        )
        return out

    def reorder(self, name: str, data: Operand, shape: tuple[int, ...]) -> Operand:
        out = Operand(f"{name}.out", shape, "int8")
        self.operators.append(pointwise(name, Kind.COPY, (data,), (out,), shape, 0.0, target="reorder"))
        return out

    def mobilevit_block(self, name: str, data: Operand, hidden: int, layers: int) -> Operand:
        batch, channels, height, width = data.shape
        local = self.conv(f"{name}.local", data, channels, 3, 1, "silu")
        local = self.conv(f"{name}.in", local, hidden, 1, 1, bias=False)
        tokens = self.reorder(f"{name}.unfold", local, (batch * height * width, hidden))
        for index in range(layers):
            tokens = self.transformer(f"{name}.layers.{index}", tokens, 4 * batch, 4)
        tokens = self.norm(f"{name}.norm", tokens)
        state = self.reorder(f"{name}.fold", tokens, local.shape)
        state = self.conv(f"{name}.out_projection", state, channels, 1, 1, "silu")
        both = Operand(f"{name}.both.out", (batch, 2 * channels, height, width), "int8")
        self.operators.append(
            pointwise(f"{name}.both", Kind.COPY, (data, state), (both,), both.shape, 0.0, target="concatenate")
        )
        return self.conv(f"{name}.fusion", both, channels, 3, 1, "silu")

    def transformer(self, name: str, state: Operand, sequences: int, heads: int) -> Operand:
        rows, hidden = state.shape
        tokens, depth = rows // sequences, hidden // heads
        inner = self.norm(f"{name}.attention_norm", state)
        query, key, value = (
            Operand(
                self.linear(f"{name}.attention.{part}", inner, hidden).name, (sequences, heads, tokens, depth), "int8"
            )
            for part in ("query", "key", "value")
        )
        out = Operand(f"{name}.attention.scores.out", (sequences, heads, tokens, depth), "int8")
        self.operators.append(attention(
            f"{name}.attention.scores", query, key, value, out, batch=sequences, heads=heads, kv_heads=heads,
            queries=tokens, keys=tokens, depth=depth, value_depth=depth, target="attention",
        ))  # fmt: skip
        mixed = self.linear(f"{name}.attention.output", Operand(out.name, (rows, hidden), "int8"), hidden)
        state = self.add(f"{name}.attention_residual", state, mixed)
        inner = self.norm(f"{name}.feed_forward_norm", state)
        inner = self.linear(f"{name}.feed_forward.up", inner, 2 * hidden, "silu")
        inner = self.linear(f"{name}.feed_forward.down", inner, hidden)
        return self.add(f"{name}.feed_forward_residual", state, inner)
