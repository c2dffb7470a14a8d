"""True integer execution: every matrix product of a network as int8 x int8 -> int32.

Weights are quantised symmetrically with one scale per output channel, activations symmetrically with one scale per
token, found while running ("dynamic"). The language-model head is included, and so are the two products of attention:
queries, keys and values have one scale per token and head; the scale of a value, which varies along the summed axis,
is multiplied into its probability before the probabilities are quantised, one scale per query. What stays in floating
point: the embedding look-up (no arithmetic), norms, rotary positions and softmax.

Scheme: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018), section 2, with zero points of 0; per-token scales as in ZeroQuant (2022), section 4.1.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from bitwright.arithmetic.quantise import quantise_symmetric
from bitwright.core.errors import BitwrightError, InputError
from bitwright.models.attention_interception import attention_arguments, replace_attention
from bitwright.models.replacement import refuse_joint_projections, replace_module

MAX_INNER = (2**31 - 1) // (128 * 128)  # longer sums of int8 products may not fit int32
Network = TypeVar("Network", bound=nn.Module)


@cache
def _int_mm_is_exact() -> bool:
    """Whether this machine's `torch._int_mm` neither saturates nor rounds, tried on extreme operands.

    CPUs without VNNI may add pairs of products in saturating 16-bit arithmetic.
    """
    for left, right in ((-128, -128), (-128, 127), (127, 127), (127, -128)):
        a = torch.full((32, 512), left, dtype=torch.int8)
        b = torch.full((512, 32), right, dtype=torch.int8)
        if not bool((torch._int_mm(a, b) == 512 * left * right).all()):
            return False
    return True


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact int32 product (m, n) of int8 matrices `a` (m, k) and `b` (k, n).

    Uses `torch._int_mm` where a self-test finds it exact, else a float64 product, which is exact for these sizes.
    Raises InputError for other types or shapes, and for k > 131,071, where an int32 sum could overflow.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise InputError(
            f"Integer product of {a.dtype} {tuple(a.shape)} by {b.dtype} {tuple(b.shape)} asked for; "
            "expected int8 (m, k) by int8 (k, n)."
        )
    if a.shape[1] > MAX_INNER:
        raise InputError(f"Integer product over k = {a.shape[1]}; int32 sums are only safe up to {MAX_INNER}.")
    if a.device.type == "cpu":
        if _int_mm_is_exact():
            return torch._int_mm(a, b)
        return (a.double() @ b.double()).to(torch.int32)
    # CUDA wants more than 16 rows and multiples of 8 elsewhere; zeros change no sum
    m, (k, n) = a.shape[0], b.shape
    a = nn.functional.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = nn.functional.pad(b, (0, -n % 8, 0, -k % 8))
    return torch._int_mm(a, b)[:m, :n]


class IntegerLinear(nn.Module):
    """A linear layer executed on integer codes: y = (codes(x) @ weight_codes) * scale(x) * weight_scale + bias.

    `weight_codes` is int8 (inputs, outputs), `weight_scale` float32 (outputs,).
    """

    weight_codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, weight_bits: int = 8, activation_bits: int = 8) -> None:
        super().__init__()
        for bits in (weight_bits, activation_bits):
            if not 2 <= bits <= 8:
                raise InputError(f"Integer execution with {bits} bits asked for; codes of 2 to 8 bits are supported.")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        weight = quantise_symmetric(linear.weight.detach().float(), weight_bits, axis=0)
        self.register_buffer("weight_codes", weight.codes.t().contiguous())
        self.register_buffer("weight_scale", weight.scale.reshape(-1))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def quantise_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 (tokens, inputs) and scales (tokens, 1) of x (..., inputs)."""
        rows = x.reshape(-1, self.in_features).float()
        tokens = quantise_symmetric(rows, self.activation_bits, axis=0)
        return tokens.codes, tokens.scale

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., in_features) quantised and multiplied in integers, then scaled: (..., out_features)."""
        codes, scale = self.quantise_input(x)
        out = integer_matmul(codes, self.weight_codes).float()
        out.mul_(scale).mul_(self.weight_scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def scheme(weight_bits: int = 8, activation_bits: int = 8) -> str:
    """What `integer_execution` does, in words for a report."""
    return (
        f"weights INT{weight_bits} symmetric per output channel, activations INT{activation_bits} symmetric per token "
        "(scale found while running), int32 accumulation, in every linear layer, the language-model head and both "
        "attention products; embedding look-up, norms, rotary positions and softmax stay in floating point"
    )


def integer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bits: int = 8,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` with both products on integer codes of `bits` bits.

    `query` (batch, heads, queries, head_dim); `key` and `value` (batch, kv_heads, keys, head_dim), where heads is a
    multiple of kv_heads; `attn_mask` broadcasts to (batch, heads, queries, keys), boolean (False: hidden) or added.
    Raises InputError as `attention_arguments`.
    """
    attn_mask, factor = attention_arguments(query, key, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    each = (0, 1, 2)
    q, k, v = (quantise_symmetric(x.float(), bits, axis=each) for x in (query, key, value))
    shared = heads // kv_heads
    grouped = (batch, kv_heads, shared * queries)
    left, left_scale = q.codes.reshape(*grouped, width), q.scale.reshape(*grouped, 1)
    scores = torch.empty(*grouped, keys, device=query.device)
    for b in range(batch):
        for g in range(kv_heads):
            scores[b, g] = integer_matmul(left[b, g].contiguous(), k.codes[b, g].t())
    scores = (scores * left_scale * k.scale.transpose(2, 3) * factor).reshape(batch, heads, queries, keys)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    weights = torch.softmax(scores, -1).reshape(*grouped, keys) * v.scale.transpose(2, 3)
    p = quantise_symmetric(weights, bits, axis=each)
    mixed = torch.empty(*grouped, width, device=query.device)
    for b in range(batch):
        for g in range(kv_heads):
            mixed[b, g] = integer_matmul(p.codes[b, g], v.codes[b, g].contiguous())
    result: Tensor = (mixed * p.scale).reshape(batch, heads, queries, width).to(query.dtype)
    return result


def integer_execution(network: Network, weight_bits: int = 8, activation_bits: int = 8) -> Network:
    """A copy of `network` whose matrix products run on integer codes; other parameters are shared with the original.

    Attention becomes `integer_attention`, see `attention_interception.replace_attention`.

    Raises InputError for bits outside 2..8 and for `nn.MultiheadAttention`, BitwrightError for a network without
    linear layers.
    """
    refuse_joint_projections(network)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, memo=dict(shared))
    layers = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise BitwrightError(f"{type(network).__name__} has no linear layers to run on integers.")
    for name in layers:
        made = IntegerLinear(cast(nn.Linear, twin.get_submodule(name)), weight_bits, activation_bits)
        twin = replace_module(twin, name, made)
    replace_attention(twin, partial(integer_attention, bits=activation_bits))
    return twin.eval()
