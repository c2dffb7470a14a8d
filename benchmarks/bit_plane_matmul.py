"""Bit-plane products beside int8 and float32 products of PyTorch, interleaved in one run.

    python benchmarks/bit_plane_matmul.py [--threads 1 2] [--repeats 9]

Writes benchmarks/results/bit_plane_matmul.json: median and least time of every product of 4096 x 4096 weights with N
columns, ratios of medians to torch int8 (exact on this machine or not is stated), and what the plan predicts from the
one-bit rate measured in the same run. Activation planes are packed inside the timed call.
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

from bitwright.kernels.bit_plane_matmul import matmul, measure_rate, pack, predict, tiling

RESULT = Path(__file__).parent / "results" / "bit_plane_matmul.json"
SIZE = 4096
WIDTHS = ((1, 1), (1, 2), (2, 2), (1, 8), (2, 8), (4, 4))


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


def measure(columns: int, threads: int, repeats: int) -> dict[str, Any]:
    """All products with `columns` columns."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    int8 = torch.from_numpy(rng.integers(-127, 128, (SIZE, SIZE)).astype(np.int8))
    acts8 = torch.from_numpy(rng.integers(-127, 128, (max(columns, 17), SIZE)).astype(np.int8))
    real, acts = int8.float(), acts8[:columns].float()
    calls: dict[str, Any] = {
        "torch int8": lambda: torch._int_mm(acts8[:columns], int8),
        "torch float32": lambda: acts @ real,
    }
    for p, q in WIDTHS:
        weights = pack(rng.integers(0, 1 << p, (SIZE, SIZE)).astype(np.uint8), p)
        codes = rng.integers(0, 1 << q, (columns, SIZE)).astype(np.uint8)
        calls[f"W{p}A{q}"] = lambda weights=weights, codes=codes, q=q: matmul(weights, pack(codes, q), threads)
    found = times(calls, repeats)
    rate = measure_rate(threads)["one_bit_macs_per_s"]
    for p, q in WIDTHS:
        entry = found[f"W{p}A{q}"]
        entry["over_int8"] = found["torch int8"]["median_s"] / entry["median_s"]
        entry["predicted_compute_s"] = predict(tiling(SIZE, columns, SIZE, p, q), rate, 1e12).compute_s
    return {"one_bit_macs_per_s": rate, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    data = {
        f"{threads} threads": {f"N = {columns}": measure(columns, threads, given.repeats) for columns in (1, 8, 512)}
        for threads in given.threads
    }
    for threads, sizes in data.items():
        for size, rows in sizes.items():
            text = ", ".join(f"{name} {row['over_int8']:.2f}" for name, row in rows.items()
                             if isinstance(row, dict) and "over_int8" in row)  # fmt: skip
            print(f"{threads}, {size}: int8 {rows['torch int8']['median_s'] * 1e3:.2f} ms; times as fast: {text}")
    RESULT.write_text(json.dumps({"evidence": "executed", "size": SIZE, **data}, indent=1) + "\n")
