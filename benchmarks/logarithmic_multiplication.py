"""L-Mul matrix products beside torch's float32 product of the same rounded operands, in one run.

    python benchmarks/logarithmic_multiplication.py [--threads 1 2] [--repeats 9]

A CPU multiplies floats as fast as it adds integers, so L-Mul is expected to be slower here: the ratios say by how much
its emulation slows a model down. Writes benchmarks/results/logarithmic_multiplication.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bitwright.arithmetic.logarithmic_multiplication import matmul, round_mantissa

RESULT = Path(__file__).parent / "results" / "logarithmic_multiplication.json"
SHAPES = ((512, 512, 512), (512, 576, 1536), (1, 576, 1536))
MANTISSA = 4


def times(calls: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Median and least seconds of every call, one after the other, `repeats` times."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = perf_counter()
            call()
            found[name].append(perf_counter() - start)
    return {name: {"median_s": median(each), "least_s": min(each)} for name, each in found.items()}


def measure(shape: tuple[int, int, int], threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """All products of (m, k) by (k, n); `slower` is the least time over that of torch."""
    torch.set_num_threads(threads)
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = (round_mantissa(rng.normal(size=size).astype(np.float32), MANTISSA) for size in ((m, k), (k, n)))
    left, right = torch.from_numpy(a), torch.from_numpy(b)
    found = times(
        {
            "torch float32": lambda: left @ right,
            "L-Mul adder": lambda: matmul(a, b, MANTISSA, threads=threads),
            "L-Mul adder, sums fp8_e4m3/32": lambda: matmul(a, b, MANTISSA, threads=threads, accumulation="fp8_e4m3"),
            "L-Mul adder, sums bf16/1": lambda: matmul(a, b, MANTISSA, threads=threads, accumulation="bf16/1"),
            "L-Mul algebraic": lambda: matmul(a, b, MANTISSA, "algebraic"),
        },
        repeats,
    )
    for entry in found.values():
        entry["slower"] = entry["least_s"] / found["torch float32"]["least_s"]
        entry["products_per_s"] = m * k * n / entry["least_s"]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    data = {
        f"{threads} threads": {" x ".join(map(str, shape)): measure(shape, threads, given.repeats) for shape in SHAPES}
        for threads in given.threads
    }
    for threads, shapes in data.items():
        for shape, rows in shapes.items():
            print(f"{threads}, {shape}:")
            for name, row in rows.items():
                print(f"  {name:32} {row['least_s'] * 1e3:9.3f} ms, {row['slower']:.2f} times as long as torch")
    RESULT.write_text(json.dumps({"evidence": "executed", "mantissa_bits": MANTISSA, **data}, indent=1) + "\n")
