"""Third-order attention beside sums over all triples on this CPU, and how its time grows with the tokens, in one run.

    python benchmarks/higher_order_attention.py [--threads 1 2] [--repeats 9]

4 and 32 channels. Peers: `torch.einsum` of logits and outputs over all triples, which holds n^3 numbers. The polynomial
form runs for entries that grow as 0.75 (log n)^(1/4), at the degree that an error of 1e-2 needs. Peak memory is that of
a process that does nothing else. Writes benchmarks/results/higher_order_attention.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.kernels.higher_order_attention import higher_order_attention
from bitwright.kernels.polynomial_attention import low_rank_attention, plan
from bitwright.reproduce.kronecker_attention import tame

RESULT = Path(__file__).parent / "results" / "higher_order_attention.json"


def operands(n: int, channels: int, size: float = 1.0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries, two sets of keys and two of values, float32."""
    generator = torch.Generator().manual_seed(0)
    q, k1, k2, v1, v2 = ((2 * torch.rand(n, channels, generator=generator) - 1) * size for _ in range(5))
    return q, [k1, k2], [v1, v2]


def all_triples(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    """What a user writes: every logit at once."""
    logits = torch.einsum("ic,jc,kc->ijk", q, *ks) / q.shape[1]
    weights = torch.softmax(logits.flatten(1), -1).view_as(logits)
    return torch.einsum("ijk,jc,kc->ic", weights, *vs)


def timed(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, interleaved, after one run that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if repeat:
                samples[name].append(perf_counter() - start)
    return {name: median(each) for name, each in samples.items()}


def peak_bytes(side: str, n: int, channels: int) -> int:
    """Growth of a fresh process's resident memory by one call."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return int(pool.apply(_grown, (side, n, channels)))


def _grown(side: str, n: int, channels: int) -> int:
    given = operands(n, channels)
    small = operands(8, channels)
    call = all_triples if side == "all triples" else higher_order_attention
    call(*small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(*given)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def exponent(times: dict[int, float]) -> float:
    """Of the tokens in time, by least squares of logarithms."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    data: dict[str, Any] = {"evidence": "executed", "repeats": asked.repeats}
    for threads in asked.threads:
        torch.set_num_threads(threads)
        found: dict[str, Any] = {}
        for channels in (4, 32):
            for n in (256, 384):
                q, ks, vs = operands(n, channels)
                calls = {
                    "blocks": lambda: higher_order_attention(q, ks, vs),  # noqa: B023
                    "all triples": lambda: all_triples(q, ks, vs),  # noqa: B023
                }
                times = timed(calls, asked.repeats)
                ratio = times["all triples"] / times["blocks"]
                found[f"{n} tokens, {channels} channels"] = {"seconds": times, "times as fast": ratio}
                print(threads, n, channels, times, f"{ratio:.2f}x", flush=True)
        exact = {n: timed({"": lambda: higher_order_attention(*operands(n, 4))}, 3)[""] for n in (128, 256, 512)}  # noqa: B023
        cheap, degrees = {}, {}
        for n in (512, 1024, 2048, 4096, 8192):
            given = operands(n, 4, tame(n))
            degrees[n] = plan(*given, 1e-2).degree
            cheap[n] = timed({"": lambda: low_rank_attention(*given, degrees[n])}, 5)[""]  # noqa: B023
        found["exact"] = {"seconds": exact, "exponent": exponent(exact)}
        found["low rank"] = {"seconds": cheap, "degrees": degrees, "exponent": exponent(cheap)}
        print(threads, found["exact"], found["low rank"], flush=True)
        data[f"{threads} threads"] = found
    memory = {side: peak_bytes(side, 512, 4) for side in ("blocks", "all triples")}
    data["peak bytes, 512 tokens, 4 channels"] = memory
    print(memory)
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
