"""A PyTorch model whose linear layers and attention products run in number formats, chosen separately.

Weights are rounded once. The inputs of every `nn.Linear` are rounded at each call; keys and values are rounded as they
enter the key-value cache, after rotary positions, one vector of head_dim channels at a time; `attention` is the format
of what meets them: queries, and the probabilities after softmax. Norms, embedding look-ups, softmax and rotary
positions stay in floating point. A value's scale varies along the tokens that the product sums over, so where both
values and probabilities have a format it is multiplied into the probabilities before these are rounded, as in
`models.integer`.

There are two ways to execute an assignment. `execute_in(model, assignment)` multiplies rounded values: every product
is exact, and sums are float32 (int32 where both operands are integers with one scale per row). `exact=True` multiplies
codes by `arithmetic.formats.matmul`: integer sums inside a scale group, float32 across groups. The two differ only by
the rounding of float32 sums, and not at all when scales are powers of two and every partial sum fits 24 bits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional

from bitwright.arithmetic import formats
from bitwright.core.errors import BitwrightError, InputError
from bitwright.models.attention_interception import attention_arguments, replace_attention
from bitwright.models.format_products import (
    Accumulation,
    Rounding,
    attention_products,
    code_product,
    product,
    rounding,
)
from bitwright.models.replacement import refuse_joint_projections, refuse_loading, replace_module

Network = TypeVar("Network", bound=nn.Module)
_CACHED = ("keys", "values")


@dataclass(frozen=True)
class FormatAssignment:
    """Which number format (a name of `arithmetic.formats.parse`) each operand has; None leaves it as it is.

    `accumulation` is the format of running sums: "fp32", or "bf16", "fp16", "fp8_e4m3" or "fp8_e5m2", rounded after
    every 32 products, or after every n with "/n" ("bf16/16"). Raises InputError for unknown names, for keys or values
    with one scale per tensor, which a cache that grows by tokens cannot have, and for L-Mul codes on one side only.
    """

    weights: str | None = None
    activations: str | None = None
    keys: str | None = None
    values: str | None = None
    attention: str | None = None
    accumulation: str = "fp32"

    def __post_init__(self) -> None:
        for role in self.roles:
            form = formats.parse(getattr(self, role))
            if role in _CACHED and getattr(form, "granularity", None) == "tensor":
                raise InputError(f"{form.name} for {role}: a cache grows by tokens; take a scale per row or group.")
        Accumulation.parse(self.accumulation)
        for left, right in (("activations", "weights"), ("attention", "keys"), ("attention", "values")):
            kinds = [getattr(formats.parse(name), "products", None) if (name := getattr(self, role)) else None
                     for role in (left, right)]  # fmt: skip
            if kinds[0] is not kinds[1]:
                raise InputError(
                    f"{left} {getattr(self, left)} meet {right} {getattr(self, right)}: codes that are multiplied by "
                    "adding them (lmul_e4m3, ...) need the same on both sides."
                )

    @property
    def roles(self) -> tuple[str, ...]:
        """The operands that have a format."""
        names = (field.name for field in fields(self) if field.name != "accumulation")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def name(self) -> str:
        """For example "weights int4/32, activations int8/row"; "unquantised" when there is nothing."""
        parts = [f"{role} {getattr(self, role)}" for role in self.roles]
        parts += [] if self.accumulation == "fp32" else [f"accumulation {self.accumulation}"]
        return ", ".join(parts) or "unquantised"


class FormatLinear(nn.Module):
    """A linear layer on rounded operands: y = round(x) @ round(weight)^T + bias, weights (outputs, inputs)."""

    bias: Tensor | None

    def __init__(
        self, linear: nn.Linear, weights: str | None, activations: str | None, accumulation: str, exact: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.accumulation = Accumulation.parse(accumulation)
        self.rounds: Rounding | None = None if activations is None else rounding(activations)
        weight = linear.weight.detach()
        self.codes = None
        if exact and weights is not None and activations is not None:
            self.formats = formats.parse(activations), formats.parse(weights)
            self.codes = self.formats[1].encode(weight.float())
        self.weight = None if self.codes is not None else (rounding(weights) if weights else Rounding())(weight.float())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        refuse_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) rounded and multiplied: (..., out_features), the dtype of x."""
        rows = x.reshape(-1, self.in_features).float()
        if self.codes is not None:
            out = code_product(*self.formats, rows, self.codes)
        else:
            assert self.weight is not None
            out = product((self.rounds or Rounding())(rows), self.weight, self.accumulation)
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def format_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    assignment: FormatAssignment,
    exact: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with both products in the formats of `assignment`.

    `query` (batch, heads, queries, head_dim); `key` and `value` (batch, kv_heads, keys, head_dim). Raises InputError
    for dropout and for heads that are no multiple of kv_heads.
    """
    mask, width = attention_arguments(query, key, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if assignment.attention is None and assignment.accumulation == "fp32":
        if assignment.keys is not None:
            key = rounding(assignment.keys).values(key)
        if assignment.values is not None:
            value = rounding(assignment.values).values(value)
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    names = (assignment.keys, assignment.values, assignment.attention)
    return attention_products(query, key, value, mask, width, *names, assignment.accumulation, exact)


def execute_in(model: Network, assignment: FormatAssignment, exact: bool = False) -> Network:
    """A copy of `model`, in evaluation mode, that runs in the formats of `assignment`; other parameters are shared.

    Every `nn.Linear` is replaced. Modules with an `attend` function get `format_attention` in its place; other calls of
    `scaled_dot_product_attention` inside `forward` are intercepted.

    Raises BitwrightError for a model without linear layers, InputError for `nn.MultiheadAttention` (whose projections
    are not `nn.Linear`) and for `exact=True` where no product has a format on both sides.
    """
    linear = assignment.weights is not None and assignment.activations is not None
    scores = assignment.attention is not None and (assignment.keys is not None or assignment.values is not None)
    if exact and not (linear or scores):
        raise InputError(f"Products of codes need a format on both sides; the assignment is: {assignment.name}.")
    if exact and assignment.accumulation != "fp32":
        raise InputError(f"Products of codes are summed exactly; {assignment.accumulation} sums go with exact=False.")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=dict(shared))
    attention = partial(format_attention, assignment=assignment, exact=exact)
    in_attention = assignment.accumulation != "fp32" or any(
        getattr(assignment, role) is not None for role in (*_CACHED, "attention")
    )
    in_linear = (assignment.weights, assignment.activations, assignment.accumulation) != (None, None, "fp32")
    refuse_joint_projections(model)
    layers = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise BitwrightError(f"{type(model).__name__} has no linear layers to run in number formats.")
    for name in layers if in_linear else ():
        linear_layer = cast(nn.Linear, twin.get_submodule(name))
        made = FormatLinear(linear_layer, assignment.weights, assignment.activations, assignment.accumulation, exact)
        twin = replace_module(twin, name, made)
    if in_attention:
        named = {"keys", "values", "attention"} & set(assignment.roles)
        replace_attention(twin, attention, "formats of keys, values and attention" if named else "")
    return twin.eval()
