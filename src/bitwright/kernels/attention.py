"""Exact softmax attention in tiles, forward and backward, with memory linear in the tokens.

`flash` takes batches (batch, tokens, heads, channels) or packed sequences (tokens, heads, channels) with cumulative
lengths; queries may have more heads than keys and values, which are not copied. It returns outputs and, on request, the
log-sum-exp of the scores, by which `attention_merge.merge` puts parts together. It is the PyTorch operator
`bitwright::flash_attention`, with gradients and fake tensors, so that it can be exported.

Source: arXiv 2307.08691: sections 3.1 (un-normalised outputs, one statistic, backward pass) and 3.2 (row blocks).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright import _native
from bitwright.core.errors import InputError
from bitwright.kernels.attention_merge import merge
from bitwright.kernels.threads import thread_count, usable_path
from bitwright.kernels.work import Work

PATHS = ("avx512", "avx2", "portable")
ROW_BLOCK, COLUMN_BLOCK, _PAD = _native.attention_block()  # queries, keys; keys and channels are padded to a vector
# Multiply-adds of the vector unit for one score, counted as two operations each: the 11 of an exponential (as
# `decode_attention_cost.decode_work`), scale, maximum and sum; backward also the difference and product of slopes.
_FORWARD, _BACKWARD = 2 * 14, 2 * 14


def _path(path: str | None) -> str:
    return usable_path(path, PATHS, _native.attention_path(), "attention")


def _rows(x: Tensor, channels: int) -> NDArray[np.float32]:
    """Rows (tokens, heads, channels) as contiguous float32, channels padded with zeros."""
    flat = x.detach().to(torch.float32)
    if channels != x.shape[-1]:
        flat = torch.nn.functional.pad(flat, (0, channels - x.shape[-1]))
    return flat.contiguous().numpy()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, softcap: float, left: int,
    right: int, path: str, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    channels = -(-q.shape[-1] // _PAD) * _PAD
    out = torch.zeros(q.shape[0], q.shape[1], channels)
    lse = torch.full(q.shape[:2], -math.inf)
    _native.attention_forward(
        _rows(q, channels), _rows(k, channels), _rows(v, channels), q_offsets.numpy(), k_offsets.numpy(), scale,
        softcap, left, right, path, threads, out.numpy(), lse.numpy(),
    )  # fmt: skip
    return out[..., : q.shape[-1]].to(q.dtype).contiguous(), lse


@torch.library.custom_op("bitwright::flash_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float, softcap: float, left: int,
    right: int, path: str, threads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, q_offsets, k_offsets, scale, softcap, left, right, path, threads)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("bitwright::flash_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor, q_offsets: Tensor, k_offsets: Tensor,
    scale: float, softcap: float, left: int, right: int, path: str, threads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    channels = -(-q.shape[-1] // _PAD) * _PAD
    made = [torch.zeros(*each.shape[:2], channels) for each in (q, k, v)]
    _native.attention_backward(
        _rows(q, channels), _rows(k, channels), _rows(v, channels), _rows(out, channels), _rows(grad, channels),
        lse.detach().contiguous().numpy(), q_offsets.numpy(), k_offsets.numpy(), scale, softcap, left, right, path,
        threads, made[0].numpy(), made[1].numpy(), made[2].numpy(),
    )  # fmt: skip
    dq, dk, dv = (each[..., : of.shape[-1]].to(of.dtype).contiguous() for each, of in zip(made, (q, k, v), strict=True))
    return dq, dk, dv


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, q_offsets, k_offsets, *options = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, q_offsets, k_offsets)
    ctx.options = options


def _gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, out, lse, q_offsets, k_offsets = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(out)
    rows: tuple[Tensor, ...] = (q, k, v, out, grad)
    channels = q.shape[-1]
    if grad_lse is not None:
        # dS = P (dP - D + dL): one more channel, zero in q, k and v, makes out . grad, which is D, into D - dL
        more = [torch.zeros_like(each[..., :1], dtype=torch.float32) for each in (q, k, v)]
        more += [-grad_lse[..., None], torch.ones_like(grad_lse[..., None])]
        rows = tuple(torch.cat((each.float(), extra.float()), -1) for each, extra in zip(rows, more, strict=True))
    q_, k_, v_, out, grad = rows
    found = torch.ops.bitwright.flash_attention_backward(
        q_, k_, v_, out, grad.contiguous(), lse, q_offsets, k_offsets, *ctx.options
    )
    if grad_lse is not None:
        found = [each[..., :channels].to(q.dtype).contiguous() for each in found]
    return (*found, *[None] * 8)


_attention.register_autograd(_gradients, setup_context=_setup)


def _offsets(given: Tensor | None, name: str, rows: int) -> Tensor:
    """Cumulative lengths as int64. Raises InputError where they do not rise from 0 to the number of rows."""
    if given is None or given.ndim != 1 or given.is_floating_point() or len(given) < 1:
        raise InputError(f"Packed rows need whole cumulative lengths {name} (sequences + 1,).")
    made = given.to(torch.int64).contiguous()
    if int(made[0]) != 0 or int(made[-1]) != rows or bool((made.diff() < 0).any()):
        raise InputError(f"{name} {made.tolist()[:8]} does not rise from 0 to {rows} rows.")
    return made


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: tuple[int, int] | None) -> None:
    if q.ndim not in (3, 4) or k.ndim != q.ndim or v.shape != k.shape:
        raise InputError(
            f"Queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}: expected (batch, tokens, "
            "heads, channels) or packed (tokens, heads, channels), keys and values of one shape."
        )
    if any(not each.is_floating_point() or each.device.type != "cpu" for each in (q, k, v)):
        raise InputError(f"Attention takes floating-point tensors on the CPU, not {q.dtype} on {q.device}.")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"Queries, keys and values have one type, not {q.dtype}, {k.dtype}, {v.dtype}.")
    if q.shape[-1] != k.shape[-1] or not q.shape[-1]:
        raise InputError(f"Queries have {q.shape[-1]} channels and keys {k.shape[-1]}; expected the same, at least 1.")
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise InputError(f"{q.shape[-2]} query heads are not a multiple of {k.shape[-2]} key-value heads.")
    if q.ndim == 4 and q.shape[0] != k.shape[0]:
        raise InputError(f"Batches of {q.shape[0]} queries and {k.shape[0]} keys do not fit.")
    if not (scale > 0 and math.isfinite(scale)) or not (softcap >= 0 and math.isfinite(softcap)):
        raise InputError(f"Scale {scale} and softcap {softcap}: expected above 0, and 0 (none) or above.")
    if window is not None and (len(window) != 2 or min(window) < -1):
        raise InputError(f"A window is (left, right) with sizes of at least 0, or -1 for no limit, not {window}.")


def flash(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: tuple[int, int] | None = None,
    scale: float | None = None, softcap: float = 0.0, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, return_lse: bool = False, threads: int | None = None, path: str | None = None,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T) v: (batch, tokens, heads, channels), or packed (tokens, heads, channels) with
    `cu_seqlens_q` and `cu_seqlens_k` (sequences + 1,), the latter by default the former.

    `causal`: query i of n sees key j of m where j <= i + m - n (aligned at the ends); `window` (left, right) limits
    keys beside that place, -1 is no limit; `softcap` c > 0 bends scores to c tanh(s / c); `scale` by default
    1 / sqrt(channels). With `return_lse` also the log-sum-exp, float32 (batch, tokens, heads) or (tokens, heads).
    Queries that see no key give 0 and -infinity. Arithmetic is float32 whatever the type; gradients are the same in
    every run with as many threads. Raises InputError for shapes, types, windows and lengths that do not fit.
    """
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None and q.ndim and q.shape[-1] else scale or 0.0
    _check(q, k, v, factor, softcap, window)
    left, right = window or (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    if q.ndim == 4:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise InputError("Cumulative lengths belong to packed rows (tokens, heads, channels), not to batches.")
        batch, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
        q_offsets, k_offsets = torch.arange(batch + 1) * tokens, torch.arange(batch + 1) * keys
    else:
        q_offsets = _offsets(cu_seqlens_q, "cu_seqlens_q", q.shape[0])
        given = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        k_offsets = _offsets(given, "cu_seqlens_k", k.shape[0])
        if len(q_offsets) != len(k_offsets):
            raise InputError(f"{len(q_offsets) - 1} sequences of queries and {len(k_offsets) - 1} of keys do not fit.")
    flat = [each.reshape(-1, *each.shape[-2:]) for each in (q, k, v)]
    out, lse = torch.ops.bitwright.flash_attention(
        *flat, q_offsets, k_offsets, factor, softcap, left, right, _path(path), thread_count(threads)
    )
    out, lse = out.view(q.shape), lse.view(q.shape[:-1])
    return (out, lse) if return_lse else out


def scores_computed(tokens: int, keys: int, causal: bool = False, window: tuple[int, int] | None = None) -> int:
    """Scores of one head in the tiles that `flash` visits: rows of a block times the keys that any of them sees, whole
    vectors of them, from the block of keys where the first one lies."""
    left, right = window or (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    total = 0
    for first in range(0, tokens, ROW_BLOCK):
        last = min(first + ROW_BLOCK, tokens)
        shift = keys - tokens
        begin = 0 if left < 0 else min(max(first + shift - left, 0), keys)
        end = keys if right < 0 else min(max(last + shift + right, 0), keys)
        for start in range(begin // COLUMN_BLOCK * COLUMN_BLOCK, end, COLUMN_BLOCK):
            total += (last - first) * -(-(min(start + COLUMN_BLOCK, keys) - start) // _PAD) * _PAD
    return total


def work(
    batch: int, tokens: int, heads: int, channels: int, *, keys: int | None = None, kv_heads: int | None = None,
    causal: bool = False, window: tuple[int, int] | None = None, backward: bool = False,
) -> Work:  # fmt: skip
    """What `flash` does: products of the visited tiles (two forward, five backward), an exponential per score, and
    every row of queries, keys, values, outputs and gradients moved once. Raises InputError for sizes below 1."""
    keys, kv_heads = keys or tokens, kv_heads or heads
    if min(batch, tokens, heads, channels, keys, kv_heads) < 1:
        raise InputError(f"Attention of {batch} x {tokens} x {heads} x {channels} asked for; expected at least 1 each.")
    scores = float(batch * heads * scores_computed(tokens, keys, causal, window))
    width = -(-channels // _PAD) * _PAD
    rows = batch * channels * (2.0 * tokens * heads + 2.0 * keys * kv_heads)
    products, other = (5, _BACKWARD) if backward else (2, _FORWARD)
    pieces = batch * (kv_heads if backward else heads * -(-tokens // ROW_BLOCK))
    return Work(
        {"matrix fp32": products * 2.0 * scores * width, "fp32": other * scores},
        {"memory": 4 * rows * (2 if backward else 1)}, pieces=pieces,
    )  # fmt: skip


def split_k(q: Tensor, k: Tensor, v: Tensor, splits: int, **options: Any) -> Any:
    """`flash` of a batch over `splits` equal parts of the keys, put together by their log-sum-exps: the same result.

    Raises InputError for packed rows, fewer than one split, and causal or windowed masks, which need whole keys.
    """
    if q.ndim != 4 or splits < 1 or options.get("causal") or options.get("window") is not None:
        raise InputError(
            "Keys are split for unmasked batches (batch, tokens, heads, channels), into at least one part."
        )
    if k.ndim != 4 or not k.shape[1]:
        raise InputError(f"Keys {tuple(k.shape)} hold no token; there is nothing to split.")
    wanted = options.pop("return_lse", False)
    parts = zip(k.tensor_split(splits, 1), v.tensor_split(splits, 1), strict=True)
    out, lse = merge([flash(q, keys, values, return_lse=True, **options) for keys, values in parts if keys.shape[1]])
    return (out, lse) if wanted else out
