"""Gaunt products beside e3nn's tensor products on this CPU, interleaved in one run.

    pip install e3nn
    python benchmarks/gaunt_tensor_product.py [--threads 1 2] [--repeats 9]

8,000 pairs of features of degrees 0 .. L (1,000 nodes of 8 channels), L = 1 to 8, forward, and with gradients of both
operands. Peers of e3nn, compiled and warm: all paths (`FullTensorProduct`, degrees up to 2 L) and the paths with
results up to degree L. Writes benchmarks/results/gaunt_tensor_product.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from e3nn import o3

from bitwright.kernels.gaunt_tensor_product import BACKENDS, gaunt_product
from bitwright.kernels.spherical_harmonics import count

RESULT = Path(__file__).parent / "results" / "gaunt_tensor_product.json"
ROWS = 8000


def sides(degree: int) -> dict[str, Callable[[torch.Tensor, torch.Tensor], Any]]:
    """What is timed at one degree, by name."""
    irreps = o3.Irreps.spherical_harmonics(degree)
    results = [o3.Irrep(each, parity) for each in range(degree + 1) for parity in (1, -1)]
    kept = o3.FullTensorProduct(irreps, irreps, filter_ir_out=results)
    found: dict[str, Any] = {
        backend: lambda x, y, backend=backend: gaunt_product(x, y, degree, backend) for backend in BACKENDS
    }
    return found | {"e3nn, all paths": o3.FullTensorProduct(irreps, irreps), "e3nn, up to L": kept}


def measure(degree: int, gradients: bool, repeats: int) -> dict[str, float]:
    """Median seconds by side; the first two calls of each (compilation) are not counted."""
    x, y = (torch.randn(ROWS, count(degree)).requires_grad_(gradients) for _ in range(2))

    def call(side: Callable[..., Any]) -> None:
        if gradients:
            torch.autograd.grad(side(x, y).sum(), (x, y))
        else:
            with torch.no_grad():
                side(x, y)

    chosen = sides(degree)
    samples: dict[str, list[float]] = {name: [] for name in chosen}
    for repeat in range(repeats + 2):
        for name, side in chosen.items():
            start = perf_counter()
            call(side)
            if repeat > 1:
                samples[name].append(perf_counter() - start)
    return {name: median(each) for name, each in samples.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8])
    given = parser.parse_args()
    torch.manual_seed(0)
    data: dict[str, Any] = {"evidence": "executed", "rows": ROWS, "repeats": given.repeats, "peer": "e3nn 0.6.0"}
    for threads in given.threads:
        torch.set_num_threads(threads)
        for gradients in (False, True):
            rows = {}
            for degree in given.degrees:
                times = measure(degree, gradients, given.repeats)
                rows[degree] = {
                    "seconds": times,
                    "times as fast as e3nn, all paths": times["e3nn, all paths"] / times["grid"],
                    "times as fast as e3nn, up to L": times["e3nn, up to L"] / times["grid"],
                }
                print(threads, gradients, degree, {name: f"{1e3 * value:.2f} ms" for name, value in times.items()},
                      f"{rows[degree]['times as fast as e3nn, up to L']:.1f}x", flush=True)  # fmt: skip
            fitted = [degree for degree in rows if degree >= 3]
            exponents = {
                name: float(np.polyfit(np.log(fitted), np.log([rows[d]["seconds"][name] for d in fitted]), 1)[0])
                for name in rows[fitted[-1]]["seconds"]
            }
            title = f"{threads} threads, {'forward and backward' if gradients else 'forward'}"
            data[title] = {"degrees": rows, "exponents of time, degree 3 and above": exponents}
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
