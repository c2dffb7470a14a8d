"""Softmax attention of queries to pairs and longer tuples of tokens, exact, with memory linear in the tokens.

With keys K1 .. Kr and values V1 .. Vr of r sets of tokens, query i sees every tuple (j1, .., jr):

    logit = scale * sum over c of Q[i, c] K1[j1, c] .. Kr[jr, c],   value = V1[j1] * .. * Vr[jr]  (element-wise)

r = 1 is ordinary attention, r = 2 the third-order attention of arXiv 2310.04064 (definition 1.1). Tuples are visited in
blocks under an online softmax; the backward pass computes them again from the log-sum-exp. Work grows with the product
of the token counts: see `polynomial_attention` for what is cheaper and when.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.core.errors import InputError
from bitwright.kernels.work import Work

_QUERIES, _TUPLES = 256, 4096  # of a block
MOST_TUPLES = 1 << 40


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Products of one row of every factor (..., n, d), row by row: (..., n1 * n2 * .., d), the last index fastest."""
    made = factors[0]
    for each in factors[1:]:
        made = (made.unsqueeze(-2) * each.unsqueeze(-3)).flatten(-3, -2)
    return made


@dataclass(frozen=True)
class _Job:
    """Sets of tokens per tuple, scale, and whether a query i sees tokens up to i only, `window` of them (0: all)."""

    order: int
    scale: float
    causal: bool
    window: int


@dataclass(frozen=True)
class _Block:
    """Queries `rows` with tuples: each of `heads` (heads, order - 1), token numbers of all sets but the last, with each
    of the tokens `last` of that."""

    rows: slice
    heads: Tensor
    last: slice

    def head(self, factors: Sequence[Tensor], but: int = -1) -> Tensor | None:
        """Products of rows of all factors (batch, n, d) without the last, and without `but`: (batch, heads, d)."""
        made: Tensor | None = None
        for at, each in enumerate(factors[:-1]):
            if at != but:
                rows = each[:, self.heads[:, at]]
                made = rows if made is None else made * rows
        return made

    def gathered(self, factors: Sequence[Tensor]) -> Tensor:
        """Products of rows of the factors (batch, n, d), the last set fastest: (batch, tuples, d)."""
        head, last = self.head(factors), factors[-1][:, self.last]
        return last if head is None else (head.unsqueeze(2) * last.unsqueeze(1)).flatten(1, 2)

    def scatter(self, made: Tensor, factors: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
        """Add the gradients of `gathered` (batch, tuples, d) to those of its factors."""
        head, last = self.head(factors), factors[-1][:, self.last]
        if head is None:
            totals[-1][:, self.last] += made
            return
        made = made.reshape(made.shape[0], len(self.heads), -1, made.shape[-1])
        totals[-1][:, self.last] += (made * head.unsqueeze(2)).sum(1)
        rest = (made * last.unsqueeze(1)).sum(2)
        for own in range(len(factors) - 1):
            others = self.head(factors, own)
            totals[own].index_add_(1, self.heads[:, own], rest if others is None else rest * others)

    def hidden(self, job: _Job) -> Tensor | None:
        """Which tuples a query does not see, (queries, tuples)."""
        if not job.causal:
            return None
        last = torch.arange(self.last.start, self.last.stop)[None]
        latest = earliest = last.expand(len(self.heads), -1)
        if self.heads.shape[1]:
            latest = torch.maximum(last, self.heads.amax(1)[:, None])
            earliest = torch.minimum(last, self.heads.amin(1)[:, None])
        i = torch.arange(self.rows.start, self.rows.stop)[:, None]
        hidden = latest.reshape(1, -1) > i
        return hidden | (earliest.reshape(1, -1) <= i - job.window) if job.window else hidden


def _blocks(job: _Job, queries: int, counts: Sequence[int]) -> Iterator[_Block]:
    """Blocks of queries with the tuples that one of these queries may see."""
    for first in range(0, queries, _QUERIES):
        end = min(first + _QUERIES, queries)
        low = max(first - job.window + 1, 0) if job.window else 0
        sizes = [(min(end, count) if job.causal else count) - low for count in counts]
        together = max(1, _TUPLES // sizes[-1])
        total = math.prod(sizes[:-1])
        for start in range(0, total, together):
            at = torch.arange(start, min(start + together, total))
            places = torch.empty(len(at), len(sizes) - 1, dtype=torch.int64)
            for column in range(len(sizes) - 2, -1, -1):
                places[:, column] = at % sizes[column] + low
                at = at // sizes[column]
            for begin in range(low, low + sizes[-1], _TUPLES):
                yield _Block(slice(first, end), places, slice(begin, min(begin + _TUPLES, low + sizes[-1])))


def _logits(job: _Job, q: Tensor, keys: Tensor, block: _Block) -> Tensor:
    logits = q[:, block.rows] @ keys.transpose(1, 2)
    hidden = block.hidden(job)
    return logits if hidden is None else logits.masked_fill_(hidden, -math.inf)


class _Attention(torch.autograd.Function):
    """out (batch, n, d_v) and its log-sum-exp (batch, n)."""

    @staticmethod
    def forward(ctx: Any, job: _Job, q: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        ks, vs = given[: job.order], given[job.order :]
        out = q.new_zeros(*q.shape[:2], vs[0].shape[-1])
        most, total = q.new_full(q.shape[:2], -math.inf), q.new_zeros(q.shape[:2])
        scaled = q * job.scale
        for block in _blocks(job, q.shape[1], [each.shape[1] for each in ks]):
            rows = block.rows
            logits = _logits(job, scaled, block.gathered(ks), block)
            highest = torch.maximum(most[:, rows], logits.amax(-1))
            kept = torch.where(highest.isfinite(), highest, 0.0)
            weights, old = logits.sub_(kept[..., None]).exp_(), (most[:, rows] - kept).exp()
            out[:, rows] = out[:, rows] * old[..., None] + weights @ block.gathered(vs)
            total[:, rows] = total[:, rows] * old + weights.sum(-1)
            most[:, rows] = highest
        out = out / total.clamp_min(torch.finfo(out.dtype).tiny)[..., None]
        lse = most + total.log()
        ctx.job = job
        ctx.save_for_backward(q, *given, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        job, (q, *given, out, lse) = ctx.job, ctx.saved_tensors
        ks, vs, slope = given[: job.order], given[job.order :], gradients[0]
        dq, others = torch.zeros_like(q), [torch.zeros_like(each) for each in given]
        delta, scaled = (slope * out).sum(-1), q * job.scale
        for block in _blocks(job, q.shape[1], [each.shape[1] for each in ks]):
            rows, keys, values = block.rows, block.gathered(ks), block.gathered(vs)
            weights = _logits(job, scaled, keys, block).sub_(lse[:, rows, None]).exp_()
            weights = weights.nan_to_num_(0.0)  # a query that sees nothing
            d_logits = weights * (slope[:, rows] @ values.transpose(1, 2) - delta[:, rows, None])
            dq[:, rows] += d_logits @ keys * job.scale
            block.scatter(d_logits.transpose(1, 2) @ scaled[:, rows], ks, others[: job.order])
            block.scatter(weights.transpose(1, 2) @ slope[:, rows], vs, others[job.order :])
        return None, dq, *others


def _checked(q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], causal: bool, window: int | None) -> None:
    if not ks or len(ks) != len(vs):
        raise InputError(f"{len(ks)} sets of keys and {len(vs)} of values; expected as many, at least one.")
    for name, each in (("Queries", q), *(("Keys", k) for k in ks), *(("Values", v) for v in vs)):
        if each.ndim < 2 or each.dtype != q.dtype or each.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name}: expected float32 or float64 tensors (..., tokens, channels), all of one type.")
        if each.shape[:-2] != q.shape[:-2] or 0 in each.shape:
            raise InputError(f"{name} {tuple(each.shape)} do not fit queries {tuple(q.shape)}.")
        if not bool(torch.isfinite(each).all()):
            raise InputError(f"{name} hold NaN or infinity.")
    for k, v in zip(ks, vs, strict=True):
        if k.shape[-1] != q.shape[-1] or k.shape[-2] != v.shape[-2] or v.shape[-1] != vs[0].shape[-1]:
            raise InputError(f"Keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit queries {tuple(q.shape)}.")
        if causal and k.shape[-2] != q.shape[-2]:
            raise InputError(f"Causal attention needs as many keys as queries, not {k.shape[-2]} and {q.shape[-2]}.")
    if window is not None and (not causal or window < 1):
        raise InputError("A window is a number of tokens of at least 1 that ends at the query: causal=True.")
    if math.prod(k.shape[-2] for k in ks) > MOST_TUPLES:
        raise InputError(f"More than {MOST_TUPLES} tuples of keys; take fewer tokens, a window, or a lower order.")


def higher_order_attention(
    q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], *, scale: float | None = None, causal: bool = False,
    window: int | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """q (..., n, d), `ks` r tensors (..., n_r, d), `vs` r tensors (..., n_r, d_v): (..., n, d_v), differentiable.

    `scale` by default 1 / d. `causal`: a query i sees tuples of tokens up to i, with `window` only of the last so many.
    With `return_lse` also the log-sum-exp of the logits, (..., n), without gradient. Raises InputError for shapes and
    types that do not fit, NaN and infinities, windows without `causal`.
    """
    _checked(q, ks, vs, causal, window)
    factor = 1 / q.shape[-1] if scale is None else float(scale)
    if not math.isfinite(factor):
        raise InputError(f"A scale is a finite number, not {scale}.")
    flat = [each.reshape(-1, *each.shape[-2:]) for each in (q, *ks, *vs)]
    out, lse = _Attention.apply(_Job(len(ks), factor, causal, window or 0), *flat)  # type: ignore[no-untyped-call]
    out = out.reshape(*q.shape[:-1], vs[0].shape[-1])
    return (out, lse.reshape(q.shape[:-1])) if return_lse else out


def work(queries: int, keys: Sequence[int], channels: int, value_channels: int, itemsize: int = 4) -> Work:
    """Without a mask: both products of all tuples, an exponential each (as `attention.work`), operands moved once."""
    tuples = float(queries) * math.prod(keys)
    moved = queries * (channels + value_channels) + sum(keys) * (channels + value_channels)
    return Work(
        {"matrix fp32": 2 * tuples * (channels + value_channels), "fp32": 28 * tuples},
        {"memory": float(itemsize * moved)}, pieces=-(-queries // _QUERIES),
    )  # fmt: skip
