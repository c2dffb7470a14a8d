"""Roofline predictions against matrix products executed on this machine.

Measures this machine (refused when it is busy unless --busy), predicts products of several shapes, runs them with
torch, interleaved, and writes measured over predicted times to benchmarks/results/roofline_on_this_machine.json. The
product that calibrated the rates (1536 cubed) is not among the shapes. One thread unless --threads says otherwise:
with more, the barriers of a busy machine dominate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

from bitwright.core.cost import roofline
from bitwright.core.errors import BitwrightError
from bitwright.core.files import write_json
from bitwright.core.measure import measure_this_machine
from bitwright.core.workload import Kind, Operator, Role, Tensor

RESULT = Path(__file__).parent / "results" / "roofline_on_this_machine.json"
SHAPES = [(1, 2048, 2048), (8, 2048, 2048), (64, 1024, 1024), (256, 1024, 4096), (512, 2048, 512), (1024, 1024, 1024),
          (2048, 512, 2048)]  # fmt: skip


def product(m: int, n: int, k: int, fmt: str) -> Operator:
    """An (m, k) @ (k, n) product."""
    return Operator(
        f"{m}x{n}x{k}", Kind.MATMUL, {"m": m, "n": n, "k": k},
        (Tensor("x", ({"m": 1}, {"k": 1}), fmt), Tensor("w", ({"k": 1}, {"n": 1}), fmt, Role.WEIGHT)),
        (Tensor("y", ({"m": 1}, {"n": 1}), fmt),),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy (marked so)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    import torch

    machine = measure_this_machine(require_idle=not options.busy, threads=options.threads)
    torch.set_num_threads(options.threads)
    cpu = machine.device()
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    inputs, times = {}, {}
    for fmt, dtype in formats.items():
        for m, n, k in SHAPES:
            copies = max(1, 64 * 2**20 // (n * k * dtype.itemsize))  # weights rotate, so that none stays in a cache
            inputs[fmt, m, n, k] = (torch.randn(m, k).to(dtype), [torch.randn(k, n).to(dtype) for _ in range(copies)])
            times[fmt, m, n, k] = []
    with torch.inference_mode():
        for _ in range(7):
            for key, (left, rights) in inputs.items():
                for right in rights:
                    start = time.perf_counter()
                    left @ right
                    times[key].append(time.perf_counter() - start)
    rows = []
    for (fmt, m, n, k), found in times.items():
        cost = roofline(product(m, n, k, fmt), cpu)
        rows.append({"format": fmt, "m": m, "n": n, "k": k, "bound": cost.bound, "predicted_s": cost.time_s,
                     "measured_s": min(found), "ratio": min(found) / cost.time_s})  # fmt: skip
        print(f"{fmt} {m:5} {n:5} {k:5}  predicted {cost.time_s * 1e6:9.1f} us  measured {min(found) * 1e6:9.1f} us  "
              f"{cost.bound:8} {rows[-1]['ratio']:.2f}")  # fmt: skip
    write_json(options.output, {
        "benchmark": "measured over predicted time of matrix products on this machine (evidence: executed, predicted)",
        "load_average": os.getloadavg()[0], "machine": machine.to_json(), "notes": list(machine.notes),
        "median_ratio": statistics.median(row["ratio"] for row in rows), "rows": rows,
    })  # fmt: skip
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitwrightError as error:
        sys.exit(f"error: {error}")
