"""Networks whose products are L-Mul: attention, linear layers, or both (arXiv 2410.00907, where it is applied).

Operands are rounded to a mantissa width with float32 exponents; sums are float32 or of few bits. Training goes through
with straight-through gradients: those of the exact products. The form "product" multiplies the rounded operands
exactly, which tells the error of L-Mul from that of rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.models.attention_interception import attention_arguments, replace_attention
from bitwright.models.replacement import refuse_joint_projections, replace_module

Network = TypeVar("Network", bound=nn.Module)
Scope = Literal["attention", "linear", "all"]


@dataclass(frozen=True)
class LogarithmicProducts:
    """How products are computed: bits, form, offset and running sums as in `logarithmic_multiplication.matmul`.

    Raises InputError and UnknownNameError for what it does not know.
    """

    mantissa: int = 4
    form: lmul.Form = "adder"
    offset: lmul.Offset = "paper"
    accumulation: str = "fp32"

    def __post_init__(self) -> None:
        if self.mantissa not in lmul.MANTISSAS:
            raise InputError(
                f"Mantissas of {', '.join(map(str, lmul.MANTISSAS))} bits are supported, not {self.mantissa}."
            )
        if self.form not in lmul.FORMS:
            raise UnknownNameError("L-Mul form", self.form, lmul.FORMS)
        if self.offset != "auto":
            lmul.fraction(self.offset, self.mantissa)
        if lmul.accumulator(self.accumulation)[0] and self.form != "adder":
            raise InputError(f"Sums in {self.accumulation} are computed for the adder form, not for {self.form}.")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """a (m, k) @ b (k, n): the dtype and device of a; straight-through gradients."""
        made: Tensor = _Product.apply(a, b, self)  # type: ignore[no-untyped-call]
        return made


class _Product(torch.autograd.Function):
    """a (m, k) @ b (k, n) by L-Mul; gradients of the exact product."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, how: LogarithmicProducts) -> Tensor:
        ctx.save_for_backward(a, b)
        left, right = (x.detach().float().cpu().numpy() for x in (a, b))
        if how.form == "product":  # the threads of torch, not those of numpy beside them
            rounded = [torch.from_numpy(lmul.round_mantissa(x, how.mantissa)) for x in (left, right)]
            return (rounded[0] @ rounded[1]).to(a.device, a.dtype)
        made = lmul.matmul(left, right, how.mantissa, how.form, how.offset, torch.get_num_threads(), how.accumulation)
        return torch.from_numpy(made).to(a.device, a.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return gradients[0] @ b.T, a.T @ gradients[0], None


def product(a: Tensor, b: Tensor, mantissa: int = 4, form: lmul.Form = "adder") -> Tensor:
    """a (m, k) @ b (k, n) with every product an L-Mul. Raises InputError as `logarithmic_multiplication.matmul`."""
    return LogarithmicProducts(mantissa, form)(a, b)


class LogarithmicLinear(nn.Module):
    """A linear layer whose products are L-Mul; it shares the parameters of the layer it is made from."""

    def __init__(self, linear: nn.Linear, how: LogarithmicProducts | None = None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.how = how or LogarithmicProducts()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        made = self.how(x.reshape(-1, x.shape[-1]), self.weight.T).reshape(*x.shape[:-1], -1)
        return made if self.bias is None else made + self.bias


def logarithmic_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *, how: LogarithmicProducts,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` with both products L-Mul; arguments as `models.integer.integer_attention`."""
    attn_mask, width = attention_arguments(query, key, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    batch, heads, queries = query.shape[:3]
    keys, shared = key.shape[2], heads // key.shape[1]
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for b in range(batch):
        for h in range(heads):
            scores = how(query[b, h], key[b, h // shared].T) * width
            if attn_mask is not None:
                mask = attn_mask.expand(batch, heads, queries, keys)[b, h]
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            out[b, h] = how(torch.softmax(scores, -1), value[b, h // shared])
    return out


def with_logarithmic_products(
    network: Network, scope: Scope = "all", mantissa: int = 4, form: lmul.Form = "adder",
    offset: lmul.Offset | Mapping[str, float] = "paper", accumulation: str = "fp32",
) -> Network:  # fmt: skip
    """A copy of `network` with L-Mul in its attention (see `attention_interception.replace_attention`), its linear
    layers, or both; parameters are shared.

    `offset` may be a constant per linear layer, by name (see `calibrated_offsets`); what it does not name keeps that of
    the paper. Raises UnknownNameError for other scopes and for layers that do not exist, InputError for
    `nn.MultiheadAttention`, BitwrightError where there are no linear layers to replace; a network that turns out to
    have no attention to replace either raises InputError when it runs.
    """
    if scope not in ("attention", "linear", "all"):
        raise UnknownNameError("scope", scope, ("attention", "linear", "all"))
    common: lmul.Offset = "paper" if isinstance(offset, Mapping) else offset
    single = offset if isinstance(offset, Mapping) else {}
    how = LogarithmicProducts(mantissa, form, common, accumulation)
    refuse_joint_projections(network)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for name in single:
        if name not in layers:
            raise UnknownNameError("linear layer", name, layers)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, memo=dict(shared))
    if scope != "attention":
        for name in layers:
            own = LogarithmicProducts(mantissa, form, single[name], accumulation) if name in single else how
            twin = replace_module(twin, name, LogarithmicLinear(cast(nn.Linear, twin.get_submodule(name)), own))
    if scope != "linear":
        needed = "L-Mul products in attention" if scope == "attention" or not layers else ""
        replace_attention(twin, partial(logarithmic_attention, how=how), needed)
    elif not layers:
        raise BitwrightError(f"{type(network).__name__} has no linear layers to replace.")
    return twin


def calibrated_offsets(
    network: nn.Module, run: Callable[[nn.Module], object], mantissa: int = 4, form: lmul.Form = "adder", rows: int = 64
) -> dict[str, float]:
    """The constant of least squared output error for every linear layer of `network` that `run(network)` reaches.

    Inputs are up to `rows` evenly spaced rows of a layer's first call; as `best_matmul_offset`. Raises BitwrightError
    when no linear layer was reached.
    """
    LogarithmicProducts(mantissa, form)
    found: dict[str, float] = {}

    def take(name: str, layer: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        if name in found:
            return
        x = arguments[0].detach().reshape(-1, layer.in_features).float().cpu().numpy()
        chosen = x[np.unique(np.linspace(0, len(x) - 1, min(rows, len(x))).astype(int))]
        weight = layer.weight.detach().float().cpu().numpy().T
        found[name] = lmul.best_matmul_offset(chosen, weight, mantissa, form, rows)

    hooks = [
        module.register_forward_pre_hook(partial(take, name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.inference_mode():
            run(network)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise BitwrightError(f"Running {type(network).__name__} reached no linear layer to choose a constant for.")
    return found
