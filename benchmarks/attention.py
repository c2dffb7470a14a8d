"""Attention in tiles beside PyTorch's on this CPU: forward and backward, interleaved in one run.

    python benchmarks/attention.py [--tokens 512 2048 8192] [--threads 1 2] [--repeats 9]

Peers: `scaled_dot_product_attention` with its flash backend and with its math backend (the whole score matrix; to 2048
tokens). Batch 1, 4 heads of 64 channels (2 heads from 8192 tokens), float32; each side has its own layout. Medians;
outputs are compared. Writes benchmarks/results/attention.json with operations per second (4 n^2 d per head forward, 2.5
times that backward, half of it with a causal mask) and the peak of the multiply-adds of this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bitwright.core.files import write_json
from bitwright.kernels.attention import flash
from bitwright.kernels.benchmark import peak_rates

RESULT = Path(__file__).parent / "results" / "attention.json"
CHANNELS = 64


def interleaved(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of every side, one after the other, an untimed call before each timed one."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            side()
            start = perf_counter()
            side()
            times[name].append(perf_counter() - start)
    return {name: median(each) for name, each in times.items()}


def measure(tokens: int, causal: bool, threads: int, repeats: int) -> dict[str, Any]:
    """One shape, forward and backward."""
    torch.set_num_threads(threads)
    heads = 4 if tokens < 8192 else 2
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, tokens, heads, CHANNELS, generator=generator) for _ in range(3)]
    planes = [each.transpose(1, 2).contiguous() for each in rows]
    backends = {"torch flash": SDPBackend.FLASH_ATTENTION}
    if tokens <= 2048:
        backends["torch math"] = SDPBackend.MATH

    def peer(backend: SDPBackend, given: list[torch.Tensor]) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*given, is_causal=causal)

    forward: dict[str, Callable[[], Any]] = {"ours": lambda: flash(*rows, causal=causal)}
    forward |= {name: lambda backend=backend: peer(backend, planes) for name, backend in backends.items()}
    error = float((flash(*rows, causal=causal).transpose(1, 2) - peer(SDPBackend.FLASH_ATTENTION, planes)).abs().max())

    def backward(make: Callable[[list[torch.Tensor]], torch.Tensor], given: list[torch.Tensor]) -> Callable[[], Any]:
        leaves = [each.clone().requires_grad_() for each in given]
        out = make(leaves)
        slope = torch.randn(out.shape, generator=generator)
        return lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True)

    backwards = {"ours": backward(lambda leaves: flash(*leaves, causal=causal), rows)}
    backwards |= {
        name: backward(lambda leaves, b=backend: peer(b, leaves), planes) for name, backend in backends.items()
    }
    operations = 4.0 * tokens * tokens * CHANNELS * heads * (0.5 if causal else 1.0)
    result: dict[str, Any] = {"tokens": tokens, "causal": causal, "threads": threads, "heads": heads, "error": error}
    for direction, sides, work in (("forward", forward, operations), ("backward", backwards, 2.5 * operations)):
        found = interleaved(sides, repeats)
        result[direction] = {
            "median_s": found, "operations_per_s": {name: work / each for name, each in found.items()},
            "times_as_fast_as": {name: each / found["ours"] for name, each in found.items()},
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    rows = []
    for threads in given.threads:
        for tokens in given.tokens:
            for causal in (False, True):
                rows.append(measure(tokens, causal, threads, given.repeats if tokens < 8192 else 3))
                row = rows[-1]
                shown = "; ".join(
                    f"{way} {row[way]['operations_per_s']['ours'] / 1e9:.0f} G/s, "
                    + ", ".join(f"x{ratio:.2f} {name}" for name, ratio in row[way]["times_as_fast_as"].items()
                                if name != "ours")
                    for way in ("forward", "backward")
                )  # fmt: skip
                print(f"{threads} threads, {tokens} tokens{', causal' if causal else ''}: {shown}", flush=True)
    peak = peak_rates()["fp32"]
    write_json(RESULT, {"evidence": "executed", "channels": CHANNELS, "peak_per_core": peak, "rows": rows})


if __name__ == "__main__":
    main()
