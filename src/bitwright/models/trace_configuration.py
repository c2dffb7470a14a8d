"""A transformer configuration as a `Workload`: prefill, decode or training, without building the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from bitwright.core.errors import InputError
from bitwright.core.operators import (
    ACTIVATION_FLOPS,
    ADAM_FLOPS,
    LAYER_NORM_FLOPS,
    RMS_NORM_FLOPS,
    SOFTMAX_FLOPS,
    Operand,
    attention,
    causal_density,
    convolution,
    gather,
    pointwise,
    product,
)
from bitwright.core.quantity import is_whole
from bitwright.core.workload import FORMAT_BITS, Kind, Operator, Role, Tensor, Workload
from bitwright.models.configurations import TransformerConfiguration, configuration

Phase = Literal["prefill", "decode", "training"]
DEFAULT_FORMATS: Mapping[Role, str] = {
    Role.WEIGHT: "bf16", Role.ACTIVATION: "bf16", Role.KV: "bf16", Role.GRADIENT: "bf16", Role.OPTIMIZER: "fp32",
}  # fmt: skip


def trace_configuration(
    config: TransformerConfiguration | str, phase: Phase = "prefill", batch: int = 1, tokens: int = 512,
    context: int = 0, formats: Mapping[Role, str] | None = None, *, logits: Literal["last", "all"] = "last",
) -> Workload:  # fmt: skip
    """The operators of one forward pass, or of one training step.

    prefill: `tokens` prompt tokens per sequence after `context` cached ones. decode: one new token per sequence after
    `context` (at least 1) cached ones; `tokens` is not used. training: forward, backward (gradient of input and of
    weight for every product) and one Adam update of every weight, logits for all tokens. A vision model's tokens are
    its patches and the class token. `formats` replaces the default formats per role (bf16, optimizer state fp32).
    `logits` says for which tokens prefill computes them. `macs` are those of a dense execution; what a causal mask
    keeps is each attention's `density`. Keys and values are read from, and written to, tensors of role KV.

    Raises InputError for extents below 1, a phase the model does not have, or unknown formats.
    """
    if isinstance(config, str):
        config = configuration(config)
    if phase not in ("prefill", "decode", "training"):
        raise InputError(f"Phase {phase!r} is not known; expected prefill, decode or training.")
    if logits not in ("last", "all"):
        raise InputError(f"logits is {logits!r}; expected 'last' or 'all'.")
    if config.family != "decoder" and (phase == "decode" or context):
        raise InputError(f"{config.name} is not a decoder: it has no decode phase and no cached context.")
    if config.family == "vision":
        tokens = config.patches + 1
    if phase == "decode":
        tokens = 1
    for label, value, least in (
        ("batch", batch, 1),
        ("tokens", tokens, 1),
        ("context", context, int(phase == "decode")),
    ):
        if not is_whole(value) or value < least:
            raise InputError(f"{label} is {value!r}; expected a whole number of at least {least} for {phase}.")
    if phase == "training" and context:
        raise InputError(f"context is {context}; training has no cached context, give 0.")
    longest = config.positions if config.family != "vision" else 0
    if longest and context + tokens > longest:
        raise InputError(f"{config.name} has {longest} learned positions; {context + tokens} tokens do not fit.")
    for role, name in (formats or {}).items():
        if name not in FORMAT_BITS:
            raise InputError(f"Format {name!r} for {role} is not known; expected one of {', '.join(FORMAT_BITS)}.")
    forward = _Forward(config, batch, tokens, context, phase, logits == "all" or phase == "training")
    operators = forward.run()
    notes = [f"{config.name}, {phase}: batch {batch}, {tokens} token(s) per sequence after {context} cached."]
    if config.family == "decoder":
        notes.append("Attention is counted dense; its density is the fraction the causal mask keeps.")
    if phase == "training":
        operators = [*operators, *_backward(operators), *_update(operators)]
        notes.append("Backward: nothing is recomputed; attention probabilities are not counted as stored.")
    workload = Workload(f"{config.name} {phase}", tuple(operators), tuple(notes))
    return workload.with_formats({**DEFAULT_FORMATS, **(formats or {})})


class _Forward:
    """Appends the operators of a forward pass; tensors between them are (rows, features) unless said otherwise."""

    def __init__(
        self, config: TransformerConfiguration, batch: int, tokens: int, context: int, phase: Phase, all_logits: bool
    ) -> None:
        self.config, self.batch, self.tokens, self.context = config, batch, tokens, context
        self.rows, self.keys = batch * tokens, context + tokens
        self.cached = config.family == "decoder" and phase != "training"
        self.all_logits = all_logits
        self.operators: list[Operator] = []

    def run(self) -> list[Operator]:
        """Embedding, layers and head."""
        state = self.patches() if self.config.family == "vision" else self.embedding()
        for index in range(self.config.layers):
            state = self.layer(f"layers.{index}", state)
        self.head(state)
        return self.operators

    def add(self, operator: Operator) -> None:
        self.operators.append(operator)

    def rows_of(self, name: str, width: int, role: Role = Role.ACTIVATION) -> Operand:
        return Operand(name, (self.rows, width), role=role)

    def weight(self, name: str, *shape: int) -> Operand:
        return Operand(name, shape, role=Role.WEIGHT)

    def linear(
        self, name: str, data: Operand, outputs: int, bias: bool, out_name: str = "", role: Role = Role.ACTIVATION,
        weight_name: str = "",
    ) -> Operand:  # fmt: skip
        rows, inputs = data.shape
        out = Operand(out_name or f"{name}.out", (rows, outputs), role=role)
        extra = [self.weight(f"{name}.bias", outputs)] if bias else []
        weight = self.weight(weight_name or f"{name}.weight", inputs, outputs)
        self.add(product(name, data, weight, out, 1, rows, outputs, inputs, extra=extra, target="linear"))
        return out

    def norm(self, name: str, data: Operand) -> Operand:
        layer = self.config.norm == "layer"
        out = Operand(f"{name}.out", data.shape)
        weights = [
            self.weight(f"{name}.{part}", data.shape[1]) for part in (("weight", "bias") if layer else ("weight",))
        ]
        flops = LAYER_NORM_FLOPS if layer else RMS_NORM_FLOPS
        self.add(pointwise(name, Kind.NORMALISATION, (data, *weights), (out,), data.shape, flops,
                           target="layer_norm" if layer else "rms_norm"))  # fmt: skip
        return out

    def elementwise(
        self, name: str, inputs: list[Operand], flops: float, target: str, out: Operand | None = None
    ) -> Operand:
        out = out or Operand(f"{name}.out", inputs[0].shape)
        self.add(pointwise(name, Kind.ELEMENTWISE, inputs, (out,), out.shape, flops, target=target))
        return out

    def embedding(self) -> Operand:
        config = self.config
        state = self.rows_of("embedding.out", config.hidden)
        ids = Operand("token_ids", (self.rows, 1), "int64", Role.INDEX)
        table = self.weight("embedding.weight", config.vocabulary, config.hidden)
        self.add(gather("embedding", table, [ids], state, target="embedding"))
        for name, extent in (("positions", config.positions), ("segments", config.segments)):
            if extent:
                places = Operand(f"{name}.ids", (self.rows, 1), "int64", Role.INDEX)
                rows = self.rows_of(f"{name}.out", config.hidden)
                self.add(
                    gather(
                        name, self.weight(f"{name}.weight", extent, config.hidden), [places], rows, target="embedding"
                    )
                )
                state = self.elementwise(f"{name}.add", [state, rows], 1, "add")
        return self.norm("embedding.norm", state) if config.family == "encoder" else state

    def patches(self) -> Operand:
        config, side = self.config, self.config.image // self.config.patch
        image = Operand("image", (self.batch, config.channels, config.image, config.image))
        weight = self.weight("patches.weight", config.hidden, config.channels, config.patch, config.patch)
        out = Operand("patches.out", (self.batch, config.hidden, side, side))
        self.add(convolution("patches", image, weight, out, [config.patch] * 2, [1, 1], 1,
                             extra=[self.weight("patches.bias", config.hidden)], target="convolution"))  # fmt: skip
        state = Operand("class_token.out", (self.batch, self.tokens, config.hidden))
        token = self.weight("class_token.weight", 1, config.hidden)
        self.add(pointwise("class_token", Kind.COPY, (token, out), (state,), state.shape, 0, target="concatenate"))
        table = self.weight("positions.weight", self.tokens, config.hidden)
        self.elementwise("positions.add", [state, table], 1, "add")
        return self.rows_of("positions.add.out", config.hidden)

    def layer(self, name: str, state: Operand) -> Operand:
        before = self.config.family != "encoder"  # norm before the block, or after the residual as in BERT
        for block, run in (("attention", self.attention_block), ("feed_forward", self.feed_forward)):
            inner = self.norm(f"{name}.{block}_norm", state) if before else state
            output = run(f"{name}.{block}", inner)
            state = self.elementwise(f"{name}.{block}_residual", [state, output], 1, "add")
            if not before:
                state = self.norm(f"{name}.{block}_norm", state)
        return state

    def attention_block(self, name: str, data: Operand) -> Operand:
        config, batch, tokens, keys = self.config, self.batch, self.tokens, self.keys
        depth, heads, kv_heads = config.head_dim, config.heads, config.kv_heads
        rotary = config.family == "decoder" and not config.positions
        role = Role.KV if self.cached else Role.ACTIVATION
        key_name, value_name = (
            f"{name}.{part}_cache" if self.cached else f"{name}.{part}.out" for part in ("key", "value")
        )
        query = self.linear(f"{name}.query", data, heads * depth, config.qkv_bias)
        key = self.linear(f"{name}.key", data, kv_heads * depth, config.qkv_bias, "" if rotary else key_name,
                          Role.ACTIVATION if rotary else role)  # fmt: skip
        self.linear(f"{name}.value", data, kv_heads * depth, config.qkv_bias, value_name, role)
        if rotary:
            turned_name = key_name if self.cached else f"{name}.key_rotary.out"
            query = self.elementwise(f"{name}.query_rotary", [query], 3, "rotary")
            key = self.elementwise(f"{name}.key_rotary", [key], 3, "rotary",
                                   Operand(turned_name, key.shape, role=role))  # fmt: skip
        shape = (batch, kv_heads, keys, depth)
        out = Operand(f"{name}.scores.out", (batch, heads, tokens, depth))
        self.add(attention(
            f"{name}.scores", Operand(query.name, (batch, heads, tokens, depth)), Operand(key.name, shape, role=role),
            Operand(value_name, shape, role=role), out, batch=batch, heads=heads, kv_heads=kv_heads, queries=tokens,
            keys=keys, depth=depth, value_depth=depth, target="attention",
            density=causal_density(tokens, keys) if config.family == "decoder" else 1.0,
        ))  # fmt: skip
        return self.linear(f"{name}.output", self.rows_of(out.name, heads * depth), config.hidden, config.bias)

    def feed_forward(self, name: str, data: Operand) -> Operand:
        config = self.config
        if config.gated:
            gate = self.linear(f"{name}.gate", data, config.feed_forward, config.bias)
            up = self.linear(f"{name}.up", data, config.feed_forward, config.bias)
            flops = ACTIVATION_FLOPS.get(config.activation, 1) + 1
            inner = self.elementwise(f"{name}.activation", [gate, up], flops, f"{config.activation}_multiply")
        else:
            up = self.linear(f"{name}.up", data, config.feed_forward, config.bias)
            flops = ACTIVATION_FLOPS.get(config.activation, 1)
            inner = self.elementwise(f"{name}.activation", [up], flops, config.activation)
        return self.linear(f"{name}.down", inner, config.hidden, config.bias)

    def head(self, state: Operand) -> None:
        config = self.config
        if config.family != "encoder":
            state = self.norm("final_norm", state)
        whole = config.family == "decoder" and self.all_logits
        if config.family == "encoder" and not config.pooler:
            return
        if not whole and self.tokens > 1:
            last = Operand("head.rows", (self.batch, config.hidden))
            self.add(pointwise("head.select", Kind.COPY, (replace(state, shape=last.shape),), (last,), last.shape, 0,
                               target="select"))  # fmt: skip
            state = last
        if config.family == "decoder":
            name = "embedding.weight" if config.tied_head else "head.weight"
            self.linear("head", state, config.vocabulary, False, weight_name=name)
        elif config.family == "vision":
            self.linear("head", state, config.classes, True)
        else:
            pooled = self.linear("pooler", state, config.hidden, True)
            self.elementwise("pooler.activation", [pooled], ACTIVATION_FLOPS["tanh"], "tanh")


def _gradient(name: str) -> str:
    return f"{name}.gradient"


def _operand(operator: Operator, index: int, output: bool = False) -> Operand:
    tensor = (operator.outputs if output else operator.inputs)[index]
    shape = tensor.shape(operator.loops) if tensor.axes else (tensor.elements(operator.loops),)
    return Operand(tensor.name, shape, tensor.format, tensor.role, tensor.size)


def _backward(forward: list[Operator]) -> list[Operator]:
    """Gradients in reverse order; a tensor's gradient is named `<tensor>.gradient`."""
    operators: list[Operator] = []
    last = _operand(forward[-1], 0, output=True)
    rows = Operand(_gradient(last.name), last.shape, role=Role.GRADIENT)
    operators.append(pointwise("loss.gradient", Kind.SOFTMAX, (last,), (rows,), last.shape, SOFTMAX_FLOPS,
                               target="cross_entropy"))  # fmt: skip
    for operator in reversed(forward):
        out = _operand(operator, 0, output=True)
        error = replace(out, name=_gradient(out.name), role=Role.GRADIENT)
        name = f"{operator.name}.backward"
        inputs = [_operand(operator, index) for index in range(len(operator.inputs))]
        grads = [replace(each, name=_gradient(each.name), role=Role.GRADIENT) for each in inputs]
        size = operator.loops
        if operator.kind is Kind.MATMUL:
            m, n, k = size["m"], size["n"], size["k"]
            operators.append(product(f"{name}.input", error, inputs[1], grads[0], 1, m, k, n, target="linear_backward"))
            operators.append(
                product(f"{name}.weight", inputs[0], error, grads[1], 1, k, n, m, target="linear_backward")
            )
            if len(inputs) > 2:
                operators.append(pointwise(f"{name}.bias", Kind.REDUCTION, (error,), (grads[2],), error.shape,
                                           reduced=(0,), target="sum"))  # fmt: skip
        elif operator.kind is Kind.CONVOLUTION:  # the image needs no gradient; non-overlapping patches are a product
            positions, taps = size["b"] * size["y"] * size["x"], size["c"] * size["r"] * size["s"]
            operators.append(product(f"{name}.weight", error, inputs[0], grads[1], 1, size["o"], taps, positions,
                                     target="convolution_backward"))  # fmt: skip
            operators.append(pointwise(f"{name}.bias", Kind.REDUCTION, (error,), (grads[2],), out.shape,
                                       reduced=(0, 2, 3), target="sum"))  # fmt: skip
        elif operator.kind is Kind.ATTENTION:
            operators.extend(_attention_backward(operator, name, grads, error))
        elif operator.kind is Kind.GATHER:
            table = grads[0]
            made = table.tensor((), min(table.elements, error.elements))
            read = (error.tensor(operator.outputs[0].axes), operator.inputs[1])
            operators.append(Operator(name, Kind.GATHER, size, read, (made,), 0.0, target="embedding_backward"))
        else:
            kept = [] if operator.kind is Kind.COPY or operator.target == "add" else inputs
            if operator.target == "select":
                grads = [replace(grads[0], shape=error.shape)]
            operators.append(pointwise(name, operator.kind, (error, *kept), grads, tuple(size.values()),
                                       2 * operator.flops_per_point, target=f"{operator.target}_backward"))  # fmt: skip
    written: set[str] = set()
    for index, operator in enumerate(operators):  # a tensor used twice: the later gradient adds to the earlier one
        earlier = tuple(tensor for tensor in operator.outputs if tensor.name in written)
        operators[index] = replace(operator, inputs=(*operator.inputs, *earlier))
        written.update(tensor.name for tensor in operator.outputs)
    return operators


def _attention_backward(operator: Operator, name: str, grads: list[Operand], error: Operand) -> list[Operator]:
    """Four products over the same loops as forward, in two fused operators (Dao et al., FlashAttention, appendix B.2).

    First the gradients of probabilities (over e) and values, then of queries and keys (over d).
    """
    size, axes = operator.loops, operator.inputs
    query, key, value = axes[:3]
    result = operator.outputs[0]
    errors = replace(result, name=error.name, role=Role.GRADIENT)
    made = [replace(axes[index], name=operand.name, role=Role.GRADIENT) for index, operand in enumerate(grads[:3])]
    common = (query, key, value, errors)

    def product_pair(part: str, width: str, read: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> Operator:
        loops = {**size, "d": size[width], "e": size[width]}
        return replace(operator, name=f"{name}.{part}", loops=loops, inputs=read, outputs=written,
                       target="attention_backward")  # fmt: skip

    return [
        product_pair("value", "e", common, (made[2],)),
        product_pair("query_key", "d", (*common, result), (made[0], made[1])),
    ]


def _update(forward: list[Operator]) -> list[Operator]:
    """Adam (Kingma and Ba, 2015, algorithm 1) on every distinct weight: two moments and a master copy per element."""
    weights: dict[str, tuple[int, ...]] = {}
    for operator in forward:
        for index, tensor in enumerate(operator.inputs):
            if tensor.role is Role.WEIGHT:
                weights.setdefault(tensor.name, _operand(operator, index).shape)
    operators = []
    for name, shape in weights.items():
        elements = (math.prod(shape),)
        weight = Operand(name, elements, role=Role.WEIGHT)
        gradient = Operand(_gradient(name), elements, role=Role.GRADIENT)
        state = [
            Operand(f"{name}.{part}", elements, role=Role.OPTIMIZER) for part in ("master", "moment_1", "moment_2")
        ]
        operators.append(pointwise(f"{name}.update", Kind.ELEMENTWISE, (gradient, *state), (weight, *state), elements,
                                   ADAM_FLOPS, target="adam"))  # fmt: skip
    return operators
