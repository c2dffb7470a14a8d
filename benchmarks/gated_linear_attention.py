"""Gated linear attention beside its recurrent form and softmax attention on this CPU, interleaved in one run.

    python benchmarks/gated_linear_attention.py [--threads 1 2] [--repeats 9] [--longest 16384]

"chunk" and "native recurrence" are our kernel; "torch recurrence" is the recurrence in PyTorch operations, one token
after the other, as is "flash-linear-attention" (its naive reference, where that package is installed); "torch chunks"
is the chunked form in PyTorch operations; "softmax" is PyTorch's causal `scaled_dot_product_attention` with heads of
equal width. The slow recurrences are timed up to 1,024 tokens. Errors are against the recurrence in float64. Growth is
the exponent of time over tokens, from the two longest. Writes benchmarks/results/gated_linear_attention.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
from torch.nn import functional

from bitwright.core.files import write_json
from bitwright.kernels.gated_linear_attention import gla, state_bytes
from bitwright.kernels.gated_linear_attention_forms import chunked, recurrent

RESULT = Path(__file__).parent / "results" / "gated_linear_attention.json"
SHAPES = ((4, 64, 64), (4, 128, 256), (2, 256, 512))  # heads, channels of keys, of values
SLOW_TOKENS = 1024


def naive() -> Any:
    """The reference of the package flash-linear-attention; None where it is not installed."""
    try:
        from fla.ops.gla.naive import naive_recurrent_gla
    except Exception:  # it needs triton, and fails in its own ways without a GPU
        return None
    return naive_recurrent_gla


def timed(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, one after the other; sides of more than a second three times."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            if len(found[name]) >= 3 and min(found[name]) > 1:
                continue
            sleep(0.005)
            if not found[name] or min(found[name]) < 0.2:
                call()
            start = perf_counter()
            call()
            found[name].append(perf_counter() - start)
    return found


def with_gradients(call: Callable[[], Any], operands: list[torch.Tensor], slope: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(call(), operands, slope)


def measure(shape: tuple[int, int, int], tokens: int, threads: int, repeats: int) -> dict[str, Any]:
    """One length, forward, and forward with backward."""
    torch.set_num_threads(threads)
    heads, keys, values = shape
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, tokens, heads, keys)
    v = torch.randn(1, tokens, heads, values)
    gates = functional.logsigmoid(torch.randn(1, tokens, heads, keys)) / 16
    scale = keys**-0.5
    wide_q, wide_k = torch.randn(2, 1, heads, tokens, values)
    wide_v = v.transpose(1, 2).contiguous()
    sides: dict[str, Callable[[], Any]] = {
        "chunk": lambda: gla(q, k, v, gates, mode="chunk"),
        "native recurrence": lambda: gla(q, k, v, gates, mode="recurrent"),
        "torch chunks": lambda: chunked(q, k, v, gates, scale),
        "softmax": lambda: functional.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True),
    }
    reference = naive()
    if tokens <= SLOW_TOKENS:
        sides["torch recurrence"] = lambda: recurrent(q, k, v, gates, scale)
        if reference is not None:
            sides["flash-linear-attention"] = lambda: reference(q, k, v, gates)
    with torch.no_grad():
        forward = timed(sides, repeats)
    leaves = [each.clone().requires_grad_() for each in (q, k, v, gates)]
    soft = [each.clone().requires_grad_() for each in (wide_q, wide_k, wide_v)]
    slope = torch.randn_like(v)
    both = {
        "chunk": with_gradients(lambda: gla(*leaves, mode="chunk"), leaves, slope),
        "softmax": with_gradients(
            lambda: functional.scaled_dot_product_attention(*soft, is_causal=True), soft, slope.transpose(1, 2)
        ),
    }
    if tokens <= SLOW_TOKENS:
        both["torch recurrence"] = with_gradients(lambda: recurrent(*leaves, scale)[0], leaves, slope)
    training = timed(both, repeats)
    row: dict[str, Any] = {
        "heads, keys, values": shape, "tokens": tokens, "threads": threads, "state_bytes": state_bytes(*shape),
        "median_s": {name: median(each) for name, each in forward.items()},
        "median_s with backward": {name: median(each) for name, each in training.items()},
    }  # fmt: skip
    for label, table in (("", row["median_s"]), (" with backward", row["median_s with backward"])):
        row[f"chunk over others{label}"] = {name: each / table["chunk"] for name, each in table.items()}
    if tokens <= SLOW_TOKENS:
        exact = recurrent(*(each.double() for each in (q, k, v, gates)), scale)[0]
        row["largest error"] = float((sides["chunk"]().double() - exact).abs().max() / exact.abs().max())
        if reference is not None:
            row["largest difference from flash-linear-attention"] = float(
                (sides["chunk"]() - reference(q, k, v, gates)[0]).abs().max() / exact.abs().max()
            )
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--longest", type=int, default=16384)
    given = parser.parse_args()
    rows, growth = [], []
    for sizes in SHAPES:
        for count in given.threads:
            lengths = [each for each in (512, 1024, 2048, 4096, 8192, 16384) if each <= given.longest]
            lengths = lengths if sizes == SHAPES[0] else [each for each in lengths if 1024 <= each <= 4096]
            mine = []
            for length in lengths:
                mine.append(measure(sizes, length, count, given.repeats))
                texts = [
                    ", ".join(
                        f"x{x:.2f} of {name}" for name, x in mine[-1][f"chunk over others{label}"].items() if x != 1
                    )
                    for label in ("", " with backward")
                ]
                print(f"{sizes} {length:6} tokens {count} threads {mine[-1]['median_s']['chunk'] * 1e3:8.2f} ms: "
                      f"{texts[0]}; with backward: {texts[1]}", flush=True)  # fmt: skip
            rows += mine
            slow, fast = mine[-1], mine[-2]
            exponents = {
                name: math.log(slow["median_s"][name] / fast["median_s"][name])
                / math.log(slow["tokens"] / fast["tokens"])
                for name in ("chunk", "softmax")
            }
            growth.append({"heads, keys, values": sizes, "threads": count, "exponent": exponents})
            print(f"  growth: {exponents}")
    write_json(
        RESULT, {"evidence": "executed", "torch": torch.__version__, "repeats": given.repeats, "rows": rows,
                 "growth": growth},
    )  # fmt: skip
