"""Decode attention by three partitions beside PyTorch on this CPU, interleaved in one run.

    python benchmarks/decode_attention.py [--threads 1 2] [--repeats 15]

lean: equal shares across heads; fixed: flash-decoding's split with its own number of parts; whole: one worker per
key-value head (FlashAttention-2). PyTorch's `scaled_dot_product_attention` runs with the query heads of a group as rows
(which reads a key once) and, where heads share keys, with `enable_gqa`; the faster of the two counts. Every sample
comes after a pause and a call of the same side that is not timed. `largest error` is against float64. "beside a
busy process": a loop on one core takes turns with one of the two threads. Writes
benchmarks/results/decode_attention.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bitwright.core.files import write_json
from bitwright.kernels.decode_attention import decode_attention

RESULT = Path(__file__).parent / "results" / "decode_attention.json"
# Title, lengths, heads, key-value heads, channels, types.
ALL = (torch.float32, torch.bfloat16, torch.float16)
CASES = (
    ("1 head, 256k tokens", (262144,), 1, 1, 128, ALL),
    ("1 head, 64k tokens", (65536,), 1, 1, 128, ALL),
    ("1 head, 16k tokens", (16384,), 1, 1, 128, ALL),
    ("3 heads, 64k tokens", (65536,), 3, 3, 128, ALL),
    ("8 heads over 1, 64k tokens", (65536,), 8, 1, 128, ALL),
    ("9 heads over 3, 8k tokens", (8192,), 9, 3, 64, ALL),
    ("9 heads over 3, 512 tokens", (512,), 9, 3, 64, ALL),
    ("32 heads over 8, 8k tokens", (8192,), 32, 8, 128, ALL[:2]),
    ("32 heads, 4k tokens", (4096,), 32, 32, 128, ALL[:2]),
    ("ragged batch of 4, 1 head, 1k to 128k tokens", (131072, 1024, 3000, 9000), 1, 1, 128, ALL[:2]),
    ("ragged batch of 4, 8 over 2, 1k to 32k tokens", (32768, 1024, 3000, 9000), 8, 2, 64, ALL[:2]),
)
Sides = dict[str, Callable[[], Any]]


def timed(sides: Sides, repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, one after the other, `repeats` times."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            sleep(0.005)  # threads of the side before, which wait by spinning, have gone to sleep
            call()
            start = perf_counter()
            call()
            found[name].append(perf_counter() - start)
    return found


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> Sides:
    """PyTorch on the same cache: sequence by sequence where lengths differ, which skips padding."""
    heads, kv_heads = q.shape[1], k.shape[1]

    def run(grouped: bool) -> Any:
        made = []
        for i, length in enumerate(lengths if len(set(lengths)) > 1 else (lengths[0],)):
            part = slice(i, i + 1) if len(set(lengths)) > 1 else slice(None)
            rows = q[part].view(-1, kv_heads, heads // kv_heads, q.shape[2]) if grouped else q[part][:, :, None]
            made.append(scaled_dot_product_attention(rows, k[part, :, :length], v[part, :, :length],
                                                     enable_gqa=not grouped and heads != kv_heads))  # fmt: skip
        return made

    found: Sides = {"torch, groups as rows": lambda: run(True)}
    return found | ({"torch, enable_gqa": lambda: run(False)} if heads != kv_heads else {})


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Attention in float64."""
    made = []
    for i, length in enumerate(lengths):
        rows = q[i].double().view(k.shape[1], -1, q.shape[2])
        weights = torch.softmax(rows @ k[i, :, :length].double().mT * q.shape[2] ** -0.5, -1)
        made.append((weights @ v[i, :, :length].double()).view(q.shape[1], -1))
    return torch.stack(made)


def measure(case: tuple[Any, ...], dtype: torch.dtype, threads: int, repeats: int) -> dict[str, Any]:
    """One shape, all sides."""
    title, lengths, heads, kv_heads, channels, _ = case
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(lengths), heads, channels, generator=generator)
    k, v = (torch.randn(len(lengths), kv_heads, max(lengths), channels, generator=generator).to(dtype)
            for _ in range(2))  # fmt: skip
    native = q.to(dtype)
    sides: Sides = {name: (lambda name=name: decode_attention(native, k, v, lengths, schedule=name))
                    for name in ("lean", "fixed", "whole")}  # fmt: skip
    others = peers(native, k, v, lengths)
    times = timed(sides | others, repeats)
    error = (decode_attention(q, k, v, lengths).double() - reference(q, k, v, lengths)).abs().max().item()
    medians = {name: median(each) for name, each in times.items()}
    torch_s = min(medians[name] for name in others)
    read = 2 * sum(lengths) * kv_heads * channels * k.element_size()
    return {
        "case": title, "type": str(dtype).removeprefix("torch."), "threads": threads, "largest error": error,
        "median_s": medians, "least_s": {name: min(each) for name, each in times.items()},
        "bytes_per_s": read / medians["lean"],
        "lean over whole": medians["whole"] / medians["lean"], "lean over fixed": medians["fixed"] / medians["lean"],
        "lean over torch": torch_s / medians["lean"],
    }  # fmt: skip


def beside_a_busy_process(repeats: int) -> dict[str, Any]:
    """Two threads, one of them slowed down: as many workers as threads, and four per thread."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 128, generator=generator)
    k, v = torch.randn(2, 1, 1, 65536, 128, generator=generator)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        times = timed({
            "2 workers": lambda: decode_attention(q, k, v, workers=2), "8 workers": lambda: decode_attention(q, k, v),
            "whole": lambda: decode_attention(q, k, v, schedule="whole"),
        }, repeats)  # fmt: skip
    finally:
        busy.terminate()
        busy.wait()
    return {name: median(each) for name, each in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    rows = []
    for shape in CASES:
        for kind in shape[-1]:
            for count in given.threads:
                row = measure(shape, kind, count, given.repeats)
                rows.append(row)
                print(f"{row['case']:46} {row['type']:9} {count} threads  {row['median_s']['lean'] * 1e6:8.0f} us "
                      f"{row['bytes_per_s'] / 1e9:5.1f} GB/s  x{row['lean over whole']:.2f} of whole heads  "
                      f"x{row['lean over fixed']:.2f} of fixed splits  x{row['lean over torch']:.2f} of torch  "
                      f"error {row['largest error']:.1e}", flush=True)  # fmt: skip
    slowed = beside_a_busy_process(given.repeats) if 2 in given.threads else {}
    print("beside a busy process:", {name: f"{seconds * 1e6:.0f} us" for name, seconds in slowed.items()})
    write_json(
        RESULT, {"evidence": "executed", "torch": torch.__version__, "repeats": given.repeats, "cases": rows,
                 "beside a busy process, seconds": slowed},
    )  # fmt: skip
