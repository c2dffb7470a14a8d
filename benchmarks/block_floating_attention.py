"""Decode attention on packed block-floating-point caches beside PyTorch on a float32 cache, interleaved in one run.

    python benchmarks/block_floating_attention.py [--tokens 2048] [--repeats 30]

Writes benchmarks/results/block_floating_attention.json: least seconds of one layer's attention of one new token, the
bytes of the cache it reads, and ratios to `scaled_dot_product_attention` on float32. "unpacked first" decodes the cache
to float32 in every call. Every result is compared with float64 attention on the same decoded numbers; "sorted" has its
channels in the order of their magnitude, as K-sort folds them.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bitwright.arithmetic import formats
from bitwright.core.files import write_json
from bitwright.kernels.block_floating_attention import PackedHeads, decode_attention

RESULT = Path(__file__).parent / "results" / "block_floating_attention.json"
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama2-7B": (32, 32, 128)}  # heads, key-value heads, channels
NAMES = ("bfp12_32", "bfp12_64", "bfp16_32")


def pack(x: Any, name: str) -> tuple[PackedHeads, Any]:
    """A cache (kv_heads, tokens, channels) packed, and what it decodes to."""
    form = formats.parse(name)
    encoded = form.encode(x)
    raw, size = form.pack(encoded), x.size * form.code_bits // 8
    codes, exponents = (part.reshape(*x.shape[:2], -1) for part in (raw[:size], raw[size:]))
    return PackedHeads(codes, exponents, form.code_bits), form.decode(encoded)


def least_s(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least seconds of every call, one after the other, `repeats` times."""
    found = {name: float("inf") for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = perf_counter()
            call()
            found[name] = min(found[name], perf_counter() - start)
    return found


def measure(shape: tuple[int, int, int], tokens: int, threads: int, repeats: int) -> dict[str, Any]:
    """One layer of one model."""
    torch.set_num_threads(threads)
    heads, kv_heads, channels = shape
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, kv_heads, tokens, channels)).astype(np.float32)
    keys[..., rng.permutation(channels)[: channels // 8]] *= 12
    query = rng.normal(size=(heads, channels)).astype(np.float32)
    order = np.argsort(np.square(keys).mean((0, 1)))
    q32, k32, v32 = (torch.from_numpy(each)[None] for each in (query[:, None], keys, values))

    def dense(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q32, k, v, enable_gqa=heads != kv_heads)

    calls: dict[str, Callable[[], Any]] = {"torch float32": lambda: dense(k32, v32)}
    bytes_read = {"torch float32": k32.nbytes + v32.nbytes}
    errors = {}
    for name in NAMES:
        form = formats.parse(name)
        for label, k, q in ((name, keys, query), (f"{name}, sorted", keys[..., order].copy(), query[:, order].copy())):
            packed_k, plain_k = pack(k, name)
            packed_v, plain_v = pack(values, name)
            calls[label] = lambda q=q, k=packed_k, v=packed_v: decode_attention(q, k, v, threads=threads)
            bytes_read[label] = sum(each.codes.nbytes + each.exponents.nbytes for each in (packed_k, packed_v))
            exact = functional.scaled_dot_product_attention(
                torch.from_numpy(q[:, None])[None].double(), torch.from_numpy(plain_k)[None].double(),
                torch.from_numpy(plain_v)[None].double(), enable_gqa=heads != kv_heads,
            )[0, :, 0]  # fmt: skip
            errors[label] = float(np.abs(calls[label]() - exact.numpy()).max())
        raw_k, raw_v = (form.encode(each) for each in (keys, values))
        calls[f"{name}, unpacked first"] = lambda form=form, k=raw_k, v=raw_v: dense(
            torch.from_numpy(form.decode(k))[None], torch.from_numpy(form.decode(v))[None]
        )
    times = least_s(calls, repeats)
    return {
        label: {"s": seconds, "over torch float32": seconds / times["torch float32"],
                "bytes": bytes_read.get(label), "largest error": errors.get(label)}
        for label, seconds in times.items()
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=30)
    given = parser.parse_args()
    data: dict[str, Any] = {}
    for model, shape in SHAPES.items():
        for threads in (1, 2):
            rows = measure(shape, given.tokens, threads, given.repeats)
            data.setdefault(model, {})[f"{threads} threads"] = rows
            for label, row in rows.items():
                print(f"{model:14} {threads} threads  {label:26} {row['s'] * 1e6:8.0f} us"
                      f"  x{row['over torch float32']:.2f} of float32")  # fmt: skip
    processor = platform.processor() or platform.machine()
    write_json(
        RESULT, {"evidence": "executed", "processor": processor, "torch": torch.__version__,
                 "tokens": given.tokens, **data},
    )  # fmt: skip
