"""Networks whose products are L-Mul: attention, linear layers, or both (arXiv 2410.00907, where it is applied).

Operands are rounded to a mantissa width with float32 exponents; sums are float32. Training goes through with
straight-through gradients: those of the exact products.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bitwright.arithmetic import logarithmic_multiplication as lmul
from bitwright.core.errors import BitwrightError, InputError, UnknownNameError

Network = TypeVar("Network", bound=nn.Module)
Scope = Literal["attention", "linear", "all"]


class _Product(torch.autograd.Function):
    """a (m, k) @ b (k, n) by L-Mul; gradients of the exact product."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, mantissa: int, form: lmul.Form) -> Tensor:
        ctx.save_for_backward(a, b)
        left, right = (x.detach().float().cpu().numpy() for x in (a, b))
        made = lmul.matmul(left, right, mantissa, form, threads=torch.get_num_threads())
        return torch.from_numpy(made).to(a.device, a.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, b = ctx.saved_tensors
        return gradients[0] @ b.T, a.T @ gradients[0], None, None


def product(a: Tensor, b: Tensor, mantissa: int = 4, form: lmul.Form = "adder") -> Tensor:
    """a (m, k) @ b (k, n) with every product an L-Mul. Raises InputError as `logarithmic_multiplication.matmul`."""
    made: Tensor = _Product.apply(a, b, mantissa, form)  # type: ignore[no-untyped-call]
    return made


class LogarithmicLinear(nn.Module):
    """A linear layer whose products are L-Mul; it shares the parameters of the layer it is made from."""

    def __init__(self, linear: nn.Linear, mantissa: int = 4, form: lmul.Form = "adder") -> None:
        super().__init__()
        if mantissa not in lmul.MANTISSAS:
            raise InputError(f"Mantissas of {', '.join(map(str, lmul.MANTISSAS))} bits are supported, not {mantissa}.")
        if form not in ("adder", "algebraic"):
            raise UnknownNameError("L-Mul form", form, ("adder", "algebraic"))
        self.weight, self.bias = linear.weight, linear.bias
        self.mantissa, self.form = mantissa, form

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        made = product(x.reshape(-1, x.shape[-1]), self.weight.T, self.mantissa, self.form)
        made = made.reshape(*x.shape[:-1], -1)
        return made if self.bias is None else made + self.bias


def logarithmic_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    enable_gqa: bool = False, *, mantissa: int = 4, form: lmul.Form = "adder",
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` with both products L-Mul; arguments as `models.integer.integer_attention`."""
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if (heads != kv_heads and not enable_gqa) or heads % kv_heads:
        raise InputError(f"Attention of {heads} heads over {kv_heads} key-value heads asked for; expected a multiple.")
    if is_causal:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    shared = heads // kv_heads
    out = torch.empty_like(query)
    for b in range(batch):
        for h in range(heads):
            scores = product(query[b, h], key[b, h // shared].T, mantissa, form) * width**-0.5
            if attn_mask is not None:
                mask = attn_mask.expand(batch, heads, queries, keys)[b, h]
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            out[b, h] = product(torch.softmax(scores, -1), value[b, h // shared], mantissa, form)
    return out


def with_logarithmic_products(
    network: Network, scope: Scope = "all", mantissa: int = 4, form: lmul.Form = "adder"
) -> Network:
    """A copy of `network` with L-Mul in its attention (modules with an `attend` function), its linear layers, or both;
    parameters are shared. Raises UnknownNameError for other scopes, BitwrightError where there is nothing to replace.
    """
    if scope not in ("attention", "linear", "all"):
        raise UnknownNameError("scope", scope, ("attention", "linear", "all"))
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, memo=dict(shared))
    replaced = 0
    for name, module in list(twin.named_modules()):
        if scope != "linear" and hasattr(module, "attend"):
            module.attend = partial(logarithmic_attention, mantissa=mantissa, form=form)
            replaced += 1
        if scope != "attention" and isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, LogarithmicLinear(module, mantissa, form))
            replaced += 1
    if not replaced:
        raise BitwrightError(f"{type(network).__name__} has no products in the scope {scope!r} to replace.")
    return twin
