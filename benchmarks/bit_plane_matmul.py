"""Bit-plane products beside int8 and float32 products of PyTorch and 4-bit weights in ONNX Runtime, interleaved in one
run, and what the costs predict.

    python benchmarks/bit_plane_matmul.py [--threads 1 2] [--repeats 9]

Writes benchmarks/results/bit_plane_matmul.json: median and least time of every product of 4096 x 4096 weights with N
columns, ratios of least times to torch int8, the times predicted from rates measured in the same run, and the number
of pairs of planes p * q at which int8 becomes faster, measured and predicted. Activations are packed inside the timed
call.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from late_dequantisation import K, N, onnx_runtime, times

from bitwright.arithmetic.late_dequantisation import quantise_weights
from bitwright.core.files import write_json
from bitwright.kernels.bit_plane_cost import bit_plane_cost, crossing, crossover_pairs, dense_cost, measure_rates
from bitwright.kernels.bit_plane_matmul import matmul, pack, tiling

RESULT = Path(__file__).parent / "results" / "bit_plane_matmul.json"
SIZE = 4096
ONE_BIT_WEIGHTS = [(1, q) for q in range(1, 9)]
WIDTHS = (*ONE_BIT_WEIGHTS, (2, 2), (2, 8), (3, 4), (4, 4))


def measure(columns: int, threads: int, repeats: int) -> dict[str, Any]:
    """All products with `columns` columns."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    int8 = torch.from_numpy(rng.integers(-127, 128, (SIZE, SIZE)).astype(np.int8))
    acts8 = torch.from_numpy(rng.integers(-127, 128, (columns, SIZE)).astype(np.int8))
    real, acts = int8.float(), acts8.float()
    calls: dict[str, Any] = {
        "torch int8": lambda: torch._int_mm(acts8, int8.t()),
        "torch float32": lambda: acts @ real.t(),
    }
    session = onnx_runtime(quantise_weights(rng.normal(0, 0.02, (K, N)), group=128), threads, 4)
    if session is not None and SIZE == K == N:
        calls["ONNX Runtime MatMulNBits, 4 bits"] = lambda: session(acts.numpy())
    for p, q in WIDTHS:
        weights = pack(rng.integers(0, 1 << p, (SIZE, SIZE)).astype(np.uint8), p)
        codes = rng.integers(0, 1 << q, (columns, SIZE)).astype(np.uint8)
        calls[f"W{p}A{q}"] = lambda weights=weights, codes=codes, q=q: matmul(weights, pack(codes, q), threads)
    found = times(calls, repeats)
    rates = measure_rates()
    level = found["torch int8"]["least_s"]
    for kind in ("int8", "float32"):
        cost = dense_cost(tiling(SIZE, columns, SIZE, 1, 1), rates, kind, threads)
        found[f"torch {kind}"] |= {"predicted_s": cost.time_s, "predicted_bound": cost.bound}
    for p, q in WIDTHS:
        cost = bit_plane_cost(tiling(SIZE, columns, SIZE, p, q), rates, threads)
        entry = found[f"W{p}A{q}"]
        entry |= {
            "speed_over_int8": level / entry["least_s"],
            "predicted_s": cost.time_s,
            "predicted_bound": cost.bound,
        }
    ladder = [found[f"W{p}A{q}"]["least_s"] for p, q in ONE_BIT_WEIGHTS]
    pairs = {"measured": crossing([p * q for p, q in ONE_BIT_WEIGHTS], ladder, level)}
    if threads == 1:
        pairs["predicted"] = crossover_pairs(columns, SIZE, rates, SIZE)
    return {"products": found, "pairs of planes as fast as int8": pairs, "rates": asdict(rates)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    data: dict[str, Any] = {}
    for threads in given.threads:
        for columns in (1, 8, 512):
            rows = measure(columns, threads, given.repeats)
            data.setdefault(f"{threads} threads", {})[f"N = {columns}"] = rows
            products = rows["products"]
            text = ", ".join(
                f"{name} {row['speed_over_int8']:.2f} ({row['predicted_s'] * 1e3:.2f}/{row['least_s'] * 1e3:.2f})"
                for name, row in products.items() if "speed_over_int8" in row
            )  # fmt: skip
            int8 = products["torch int8"]
            print(f"{threads} threads, N = {columns}: int8 {int8['least_s'] * 1e3:.2f} ms; times as fast", end=" ")
            print(f"(predicted/measured ms): {text}; {rows['pairs of planes as fast as int8']}", flush=True)
    processor = platform.processor() or platform.machine()
    write_json(
        RESULT, {"evidence": "executed", "processor": processor, "torch": torch.__version__, "size": SIZE, **data}
    )
