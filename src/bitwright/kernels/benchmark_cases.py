"""What `bitwright kernels bench` times: for every kernel a few shapes of real networks and what a user would pick
instead. Operands are random and the same for all sides of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from bitwright.kernels.benchmark import Case
from bitwright.kernels.sequence_benchmark_cases import (
    attention,
    decode_attention,
    gated_linear_attention,
    kept_activations,
)
from bitwright.kernels.sparse_benchmark_cases import block_sparse, sparse_products
from bitwright.kernels.work import Work


def _torch(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def _int8_product(x: Any, w: Any) -> Callable[[int], Any]:
    """torch's int8 product of x (m, k) and w (k, n); it takes 17 rows and more."""
    import torch

    rows = x if len(x) > 16 else torch.nn.functional.pad(x, (0, 0, 0, 17 - len(x)))
    return lambda threads: torch._int_mm(rows, w)[: len(x)]


def _bit_planes(bits: int, n: int, one_bit: float) -> Case:
    from bitwright.kernels.bit_plane_matmul import matmul, pack, tiling

    rng = np.random.default_rng(0)
    plan = tiling(4096, n, 4096, bits, bits)
    w, a = (rng.integers(0, 1 << bits, (rows, 4096)).astype(np.uint8) for rows in (4096, n))
    packed_w, packed_a, out = pack(w, bits), pack(a, bits), np.empty((4096, n), np.int32)
    x8, w8 = _torch(a.astype(np.int8)), _torch(w.astype(np.int8)).t()
    x32, w32 = x8.float(), w8.float()
    return Case(
        "bit-planes", f"W{bits}A{bits} 4096x4096 by {n}", lambda threads: matmul(packed_w, packed_a, threads, out=out),
        {"torch int8": _int8_product(x8, w8), "torch fp32": lambda threads: x32 @ w32},
        Work({"one-bit planes": 1024.0 * plan.steps}, {"memory": plan.bytes_moved}, pieces=plan.tiles),
        {"one-bit planes": one_bit}, 2.0 * 4096 * 4096 * n,
    )  # fmt: skip


def bit_planes() -> list[Case]:
    """Products of 1- and 2-bit codes, 4096 x 4096 by 64 and by 1."""
    from bitwright.kernels.bit_plane_cost import measure_rates

    one_bit = 2 * measure_rates(3).one_bit_macs_per_s
    return [_bit_planes(bits, n, one_bit) for bits, n in ((1, 64), (2, 64), (1, 1))]


def _late_dequantisation(rows: int) -> Case:
    from bitwright.arithmetic.late_dequantisation import quantise_tokens, quantise_weights
    from bitwright.kernels.late_dequantisation import matmul, pack, work

    rng = np.random.default_rng(0)
    weights = quantise_weights(rng.normal(0, 0.02, (4096, 4096)), group=128)
    packed, kept = pack(weights), _torch(weights.dequantise().astype(np.float32))
    int8 = _torch(rng.integers(-127, 128, (4096, 4096)).astype(np.int8))
    x = rng.normal(size=(rows, 4096)).astype(np.float32)
    codes, scale = quantise_tokens(x)
    real = _torch(x)
    return Case(
        "late-dequantisation", f"W4A8 4096x4096 by {rows}", lambda threads: matmul(codes, packed, scale, threads),
        {"torch int8": _int8_product(_torch(codes), int8), "torch fp32": lambda threads: real @ kept},
        work(rows, packed), {}, 2.0 * rows * 4096 * 4096,
    )  # fmt: skip


def late_dequantisation() -> list[Case]:
    """Int8 activations by 4-bit weights in groups of 128, 4096 x 4096, one row and 64."""
    return [_late_dequantisation(rows) for rows in (1, 64)]


def block_floating_attention() -> list[Case]:
    """One query of 32 heads against 8 key-value heads of 128 channels and 4096 tokens, packed bfp12_32."""
    import torch

    from bitwright.arithmetic import formats
    from bitwright.kernels.block_floating_attention import PackedHeads, decode_attention

    form = formats.parse("bfp12_32")

    def pack(x: Any) -> PackedHeads:
        raw, size = form.pack(form.encode(x)), x.size * form.code_bits // 8
        codes, exponents = (part.reshape(*x.shape[:2], -1) for part in (raw[:size], raw[size:]))
        return PackedHeads(codes, exponents, form.code_bits)

    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, channels, tokens = 32, 8, 128, 4096
    query = torch.randn(heads, channels, generator=generator)
    keys, values = (torch.randn(kv_heads, tokens, channels, generator=generator) for _ in range(2))
    packed_k, packed_v = pack(keys.numpy()), pack(values.numpy())
    stored = sum(each.codes.nbytes + each.exponents.nbytes for each in (packed_k, packed_v))
    operations = 4.0 * heads * tokens * channels
    q = query.view(1, heads, 1, channels)
    k, v = (each.repeat_interleave(heads // kv_heads, 0)[None] for each in (keys, values))

    def peer(threads: int) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return [Case(
        "block-floating-attention", f"{heads} heads over {kv_heads}, {tokens} tokens, bfp12_32",
        lambda threads: decode_attention(query.numpy(), packed_k, packed_v, threads=threads), {"torch SDPA fp32": peer},
        Work({"matrix fp32": operations}, {"memory": stored}, pieces=kv_heads),
    )]  # fmt: skip


def shifts() -> list[Case]:
    """Linear layers whose weights are signed powers of two, and sums of the rows that masks select."""
    from bitwright.kernels.shift_and_add import matadd, pack_mask, pack_shifts, shift_linear

    rng = np.random.default_rng(0)
    exponent, sign = rng.integers(-7, 1, (1024, 1024)), rng.choice([-1, 1], (1024, 1024))
    x = rng.normal(size=(256, 1024)).astype(np.float32)
    weights = pack_shifts(exponent, sign)
    w, real = _torch((sign * 2.0**exponent).astype(np.float32)), _torch(x)
    additions = 256.0 * 1024 * 1024
    mask = rng.integers(0, 2, (8, 256, 256)).astype(np.uint8)
    v = rng.normal(size=(8, 256, 64)).astype(np.float32)
    packed, chosen, rows = pack_mask(mask), _torch(mask.astype(np.float32)), _torch(v)
    return [
        Case(
            "shifts", "shift layer 1024x1024 by 256", lambda threads: shift_linear(x, weights, threads=threads),
            {"torch fp32": lambda threads: real @ w.t()},
            Work({"additions": additions}, {"memory": weights.places.nbytes + 2 * x.nbytes}, pieces=16),
            useful=2 * additions,
        ),
        Case(
            "shifts", "masked sums, 8 of 256x256 by 64", lambda threads: matadd(packed, v, threads),
            {"torch fp32": lambda threads: chosen @ rows},
            Work({"additions": float(mask.sum()) * 64}, {"memory": packed.words.nbytes + 2 * v.nbytes}, pieces=16),
            useful=2.0 * mask.size * 64,
        ),
    ]  # fmt: skip


CASES: Mapping[str, Callable[[], Sequence[Case]]] = MappingProxyType({
    "bit-planes": bit_planes,
    "late-dequantisation": late_dequantisation,
    "block-floating-attention": block_floating_attention,
    "shifts": shifts,
    "block-sparse": block_sparse,
    "sparse": sparse_products,
    "attention": attention,
    "kept-activations": kept_activations,
    "decode-attention": decode_attention,
    "gated-linear-attention": gated_linear_attention,
})  # fmt: skip
