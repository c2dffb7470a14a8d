"""The three forms of gated linear attention in PyTorch operations, of any floating type and with autograd.

Per head: state_t = diag(alpha_t) state_(t-1) + key_t value_t, output_t = scale query_t state_t. All take queries and
keys (batch, tokens, heads, keys), values (batch, tokens, heads, values) and log alpha (batch, tokens, heads, keys)
<= 0, and give outputs (batch, tokens, heads, values) and the last state (batch, heads, keys, values). They are the
reference of the native kernel (`bitwright.kernels.gated_linear_attention`), and run where it does not. Source: arXiv
2312.06635, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _start(q: Tensor, v: Tensor, initial: Tensor | None) -> Tensor:
    if initial is not None:
        return initial
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, scale: float, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    state = _start(q, v, initial)
    outputs = []
    for t in range(q.shape[1]):
        state = log_alpha[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outputs, 1), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, scale: float, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All pairs of tokens at once, factored about the start of the sequence: exp(-sum of gates) overflows where they
    decay by more than the type's range, in float32 after some 88 powers of e."""
    decay = log_alpha.cumsum(1)
    past, rest = decay.exp(), (decay[:, -1:] - decay).exp()
    weights = torch.einsum("bthk,bshk->bhts", q * scale * past, k * (-decay).exp()).tril()
    start = _start(q, v, initial)
    out = torch.einsum("bhts,bshv->bthv", weights, v) + torch.einsum("bthk,bhkv->bthv", q * scale * past, start)
    return out, past[:, -1, :, :, None] * start + torch.einsum("bshk,bshv->bhkv", k * rest, v)


def _weights(q: Tensor, k: Tensor, decay: Tensor, sub: int) -> Tensor:
    """Weights (batch, heads, tokens, tokens) of values within a chunk: products of factors of at most 1 between
    sub-chunks, channel by channel in at least float32 within them. `decay`: running sums of the gates."""
    tokens = q.shape[1]
    weights = q.new_zeros(q.shape[0], q.shape[2], tokens, tokens)
    for first in range(0, tokens, sub):
        rows = slice(first, min(first + sub, tokens))
        meet = decay[:, first - 1 : first] if first else torch.zeros_like(decay[:, :1])
        if first:
            before = (k[:, :first] * (meet - decay[:, :first]).exp().to(k.dtype)).to(k.dtype)
            here = q[:, rows] * (decay[:, rows] - meet).exp().to(q.dtype)
            weights[:, :, rows, :first] = torch.einsum("bthk,bshk->bhts", here, before)
        gap = decay[:, rows, None] - decay[:, None, rows]  # (batch, t, s, heads, keys)
        lower = torch.ones(gap.shape[1:3], dtype=torch.bool).tril()[None, :, :, None, None]
        near = torch.where(lower, gap, -torch.inf).exp()
        pairs = q[:, rows, None].to(gap.dtype) * k[:, None, rows].to(gap.dtype) * near
        weights[:, :, rows, rows] = pairs.sum(-1).permute(0, 3, 1, 2).to(q.dtype)
    return weights


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, scale: float, initial: Tensor | None = None, chunk: int = 64,
    sub: int = 16,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunks through the state, sub-chunks through factors that only decay. Gates and state stay in at least float32,
    products run in the type of `q`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    state = _start(q, v, initial).to(wide)
    outputs = []
    for first in range(0, q.shape[1], chunk):
        part = slice(first, first + chunk)
        qs, ks, vs = q[:, part] * scale, k[:, part], v[:, part]
        decay = log_alpha[:, part].to(wide).cumsum(1)
        last = decay[:, -1:]
        out = torch.einsum("bhts,bshv->bthv", _weights(qs, ks, decay, sub), vs)
        past = (qs * decay.exp().to(q.dtype)).to(q.dtype)
        outputs.append(out + torch.einsum("bthk,bhkv->bthv", past, state.to(q.dtype)))
        kept = (ks * (last - decay).exp().to(k.dtype)).to(k.dtype)
        state = last[:, 0, :, :, None].exp() * state + torch.einsum("bshk,bshv->bhkv", kept, vs).to(wide)
    return torch.cat(outputs, 1), state


def combine(decays: Sequence[Tensor], states: Sequence[Tensor]) -> list[Tensor]:
    """States at the start of every part of a sequence, from each part's own total decay exp(sum of gates)
    (batch, heads, keys) and the state it makes from nothing: what ranks of a sequence-parallel group pass on, keys x
    values numbers per head and hop. Source: section 4.3 (materialised form)."""
    found = [torch.zeros_like(states[0])]
    for decay, state in zip(decays[:-1], states[:-1], strict=True):
        found.append(decay[..., None] * found[-1] + state)
    return found
