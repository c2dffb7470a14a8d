"""Gated linear attention on the CPU: float32, in chunks or token by token, with gradients.

Per head, state_t = diag(alpha_t) state_(t-1) + key_t value_t and output_t = scale query_t state_t, with a gate alpha
in (0, 1] for every key channel: time linear in tokens, and memory for one state. In chunks most work is products of
matrices; factors between tokens never overflow (sums of logarithms, two levels of chunks). Token by token it is one
pass over the state. Gradients go through chunks; states are computed again, and the gates' gradient is the reverse
running sum of query times its gradient less key times its gradient.

Source: arXiv 2312.06635, sections 4.2 to 4.4 and appendix C.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bitwright import _native
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.quantity import is_whole
from bitwright.kernels import gated_linear_attention_forms as forms
from bitwright.kernels.threads import thread_count, usable_path
from bitwright.kernels.work import Work

PATHS = ("avx512", "avx2", "portable")
Mode = Literal["auto", "chunk", "recurrent", "parallel"]
MODES: tuple[Mode, ...] = ("auto", "chunk", "recurrent", "parallel")
_FASTEST = _native.gla_path()
_FEW_TOKENS = 8  # chunks of fewer tokens than this are mostly padding
_NEAR_STATE_BYTES = 64 * 1024  # up to here one pass per token over the state costs less than chunks (measured)


def _array(x: Tensor) -> np.ndarray:
    """float32 (tokens of all sequences, heads, channels), contiguous."""
    found: np.ndarray = x.detach().to(torch.float32).contiguous().flatten(0, 1).numpy()
    return found


def _state(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().to(torch.float32).contiguous().numpy()


_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_alpha, Tensor? initial, Tensor offsets, float scale, int chunk, "
    "int sub, bool recurrent, int threads, str path) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_alpha, Tensor? initial, Tensor offsets, float scale, int chunk, "
    "int sub, int threads, str path, Tensor d_out, Tensor d_last) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("bitwright::gated_linear_attention", mutates_args=(), schema=_FORWARD)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, initial: Tensor | None, offsets: Tensor, scale: float,
    chunk: int, sub: int, recurrent: bool, threads: int, path: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(v.shape, dtype=torch.float32)
    last = torch.empty(len(offsets) - 1, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    _native.gla_forward(
        _array(q), _array(k), _array(v), _array(log_alpha), offsets.numpy(), _state(initial), scale, chunk, sub,
        recurrent, path, threads, out.flatten(0, 1).numpy(), last.numpy(),
    )  # fmt: skip
    return out.to(v.dtype), last


@torch.library.custom_op("bitwright::gated_linear_attention_backward", mutates_args=(), schema=_BACKWARD)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, initial: Tensor | None, offsets: Tensor, scale: float,
    chunk: int, sub: int, threads: int, path: str, d_out: Tensor, d_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v, d_gates = (torch.empty(x.shape, dtype=torch.float32) for x in (q, k, v, log_alpha))
    d_initial = torch.empty(len(offsets) - 1, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    _native.gla_backward(
        _array(q), _array(k), _array(v), _array(log_alpha), offsets.numpy(), _state(initial), scale, _array(d_out),
        _state(d_last), chunk, sub, path, threads, d_q.flatten(0, 1).numpy(), d_k.flatten(0, 1).numpy(),
        d_v.flatten(0, 1).numpy(), d_gates.flatten(0, 1).numpy(), d_initial.numpy(),
    )  # fmt: skip
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_gates.to(log_alpha.dtype), d_initial


@_forward.register_fake
def _(q, k, v, log_alpha, initial, offsets, scale, chunk, sub, recurrent, threads, path):  # type: ignore[no-untyped-def]
    states = (offsets.shape[0] - 1, q.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(states, dtype=torch.float32)


@_backward.register_fake
def _(q, k, v, log_alpha, initial, offsets, scale, chunk, sub, threads, path, d_out, d_last):  # type: ignore[no-untyped-def]
    states = (offsets.shape[0] - 1, q.shape[2], q.shape[3], v.shape[3])
    return (*(torch.empty_like(x) for x in (q, k, v, log_alpha)), v.new_empty(states, dtype=torch.float32))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, scale, chunk, sub, _, threads, path = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (scale, chunk, sub, threads, path)


def _differentiate(ctx, d_out, d_last):  # type: ignore[no-untyped-def]
    *tensors, initial, offsets = ctx.saved_tensors
    slopes = torch.ops.bitwright.gated_linear_attention_backward(
        *tensors, initial, offsets, *ctx.settings, d_out, d_last
    )
    d_initial = slopes[4].to(initial.dtype) if initial is not None else None
    return (*slopes[:4], d_initial, *(None,) * 7)


_forward.register_autograd(_differentiate, setup_context=_keep)


def _check(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor) -> None:
    for name, x in (("Queries", q), ("keys", k), ("values", v), ("log_alpha", log_alpha)):
        if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
            raise InputError(f"{name} are floating (batch, tokens, heads, channels), not {x.dtype} {tuple(x.shape)}.")
        if x.device.type != "cpu":
            raise InputError(f"{name} are on {x.device}; this kernel runs on the CPU.")
    if k.shape != q.shape or log_alpha.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise InputError(
            f"Queries {tuple(q.shape)}, keys {tuple(k.shape)}, log_alpha {tuple(log_alpha.shape)} and values "
            f"{tuple(v.shape)} do not fit: batch, tokens and heads are those of all, channels those of queries."
        )


def _check_values(log_alpha: Tensor) -> None:
    largest = float(log_alpha.detach().max())
    if not largest <= 0:
        raise InputError(f"log_alpha is at most 0 (a gate in (0, 1]) and not NaN; the largest given is {largest}.")


def _boundaries(cu_seqlens: Tensor | None, q: Tensor) -> Tensor:
    """First token of every sequence in the flattened batch, and the end."""
    if cu_seqlens is None:
        return torch.arange(q.shape[0] + 1, dtype=torch.int64) * q.shape[1]
    bounds = cu_seqlens.to(torch.int64).contiguous()
    rises = bounds.ndim == 1 and len(bounds) > 1 and bool((bounds.diff() >= 0).all())
    if q.shape[0] != 1 or not rises or bounds[0] != 0 or bounds[-1] != q.shape[1]:
        raise InputError(
            f"Packed sequences are one batch entry and rising boundaries from 0 to {q.shape[1]}; given batch "
            f"{q.shape[0]} and {bounds.tolist()}."
        )
    return bounds


def gla(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, *, chunk: int = 64, sub: int = 16,
    initial_state: Tensor | None = None, return_state: bool = False, mode: str = "auto",
    cu_seqlens: Tensor | None = None, scale: float | None = None, threads: int | None = None, path: str | None = None,
    validate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Gated linear attention of `q`, `k` (batch, tokens, heads, keys), `v` (batch, tokens, heads, values) under gates
    `log_alpha` (batch, tokens, heads, keys) <= 0; outputs like `v`, differentiable in all of them.

    `mode`: "chunk" (chunks of `chunk` tokens in sub-chunks of `sub`), "recurrent" (token by token), "auto" (recurrent
    for up to 8 tokens and where a head's state fits near the core, else chunks), "parallel" (PyTorch, all pairs of
    tokens; overflows for strong gates: the form to compare with). float64 runs in PyTorch; other types as float32 in
    the native kernel. `initial_state` and the returned last state are (sequences, heads, keys, values), the latter
    float32 (float64 for float64). `cu_seqlens` (sequences + 1,) packs sequences in one batch entry; each begins with
    its own state. `scale`: 1 / sqrt(keys). Raises InputError for what does not fit, gates above 0 or NaN (looked for
    unless `validate` is off), and a chunk that is not whole sub-chunks; UnknownNameError for another mode.
    """
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    _check(q, k, v, log_alpha)
    if not (is_whole(chunk) and is_whole(sub) and sub >= 1 and chunk >= sub and chunk % sub == 0):
        raise InputError(f"A chunk of {chunk} tokens is not whole sub-chunks of {sub}.")
    if validate:
        _check_values(log_alpha)
    offsets = _boundaries(cu_seqlens, q)
    states = (len(offsets) - 1, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != states:
        raise InputError(f"The initial state is {states}, not {tuple(initial_state.shape)}.")
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if mode == "parallel" or q.dtype == torch.float64:
        out, last = _by_torch(q, k, v, log_alpha, factor, initial_state, offsets, mode, (chunk, sub), cu_seqlens)
    else:
        near = 4 * q.shape[3] * v.shape[3] <= _NEAR_STATE_BYTES
        recurrent = mode == "recurrent" or (mode == "auto" and (near or q.shape[1] <= _FEW_TOKENS))
        out, last = torch.ops.bitwright.gated_linear_attention(
            q, k, v, log_alpha, initial_state, offsets, factor, chunk, sub, recurrent, thread_count(threads),
            usable_path(path, PATHS, _FASTEST, "gated linear attention"),
        )  # fmt: skip
    return (out, last) if return_state else out


def _by_torch(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, scale: float, initial: Tensor | None, offsets: Tensor,
    mode: str, sizes: tuple[int, int], cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A form of PyTorch operations, sequence by sequence where they are packed."""

    def one(part: slice, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        given = q[:, part], k[:, part], v[:, part], log_alpha[:, part]
        if mode == "parallel":
            return forms.parallel(*given, scale, initial)
        if mode == "recurrent":
            return forms.recurrent(*given, scale, initial)
        return forms.chunked(*given, scale, initial, *sizes)

    if cu_seqlens is None:
        return one(slice(None), initial)
    outputs, states = [], []
    for i, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        given = None if initial is None else initial[i : i + 1]
        if first == end:
            states.append(torch.zeros_like(q[:, 0, :, :, None] * v[:, 0, :, None]) if given is None else given)
            continue
        out, last = one(slice(first, end), given)
        outputs.append(out)
        states.append(last)
    return torch.cat(outputs, 1), torch.cat(states)


def state_bytes(heads: int, keys: int, values: int, layers: int = 1) -> int:
    """Bytes of the float32 states of all heads and layers of one sequence, whatever its length."""
    return 4 * layers * heads * keys * values


def work(batch: int, tokens: int, heads: int, keys: int, values: int, chunk: int = 64, itemsize: int = 4) -> Work:
    """What the chunked form does: two products with the state (read and advance), causal products of queries, keys and
    values within chunks of `chunk`, operands and outputs of `itemsize` bytes moved once; a piece is a head of a
    sequence, whose state stays on the core.

    Source: arXiv 2312.06635, section 4.2 (4 keys values + chunk (keys + values) operations per token and head).
    """
    if min(batch, tokens, heads, keys, values, chunk) < 1:
        raise InputError(f"Shapes of {(batch, tokens, heads, keys, values)} in chunks of {chunk}: all are at least 1.")
    every = batch * tokens * heads
    operations = every * (4.0 * keys * values + min(chunk, tokens) * (keys + values))
    moved = every * (3 * keys + 2 * values) * itemsize
    return Work({"matrix fp32": operations}, {"memory": float(moved)}, pieces=batch * heads)
