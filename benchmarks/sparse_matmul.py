"""Unstructured sparse products beside their peers on this CPU, interleaved in one run.

    python benchmarks/sparse_matmul.py [--threads 1 2] [--repeats 11] [--quick]

Float16 weights 4096 x 4096 and 11008 x 4096 with 50 to 95 % zeros by 1 to 64 columns, in all three forms. Peers: the
dense product in bfloat16 and float32 (torch), torch's and scipy's CSR in float32, MKL through sparse-dot-mkl where
installed. The dense matrices of 11008 x 4096 are larger than the last-level cache. Writes
benchmarks/results/sparse_matmul.json.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy import sparse

from bitwright.kernels.sparse_matmul import BitmapTiles, BlockedCSR, TiledCSL, best_form, matmul, usable_path
from bitwright.reproduce.flash_llm import pruned

RESULT = Path(__file__).parent / "results" / "sparse_matmul.json"
COLUMNS = (1, 4, 8, 16, 32, 64)


def measure(m: int, k: int, sparsity: float, threads: int, repeats: int) -> dict[str, Any]:
    """All sides of one matrix: median seconds by columns and side, ratios, bytes per weight by form."""
    torch.set_num_threads(threads)
    w = pruned(m, k, sparsity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's CSR is in beta; words are large at 50 %
        forms = {"words": TiledCSL.from_dense(w), "bitmap": BitmapTiles.from_dense(w), "rows": BlockedCSR.from_dense(w)}
        real = torch.from_numpy(w.astype(np.float32))
        torch_csr, scipy_csr = real.to_sparse_csr(), sparse.csr_array(w.astype(np.float32))
    half = real.bfloat16()
    found: dict[str, Any] = {
        "bytes per weight": {name: form.nbytes / w.size for name, form in forms.items()}
        | {"bfloat16": 2.0, "float32 CSR": (scipy_csr.data.nbytes + scipy_csr.indices.nbytes) / w.size}
    }
    for n in COLUMNS:
        b = np.random.default_rng(1).normal(size=(k, n)).astype(np.float32)
        x, columns = torch.from_numpy(b.T.copy()), torch.from_numpy(b)
        x_half = x.bfloat16()
        chosen = type(best_form(w[:512], n))
        calls: dict[str, Callable[[], Any]] = {
            name: lambda form=form, b=b: matmul(form, b, threads=threads)  # type: ignore[misc]
            for name, form in forms.items()
        }
        calls |= {
            "torch bfloat16": lambda x=x_half: torch.nn.functional.linear(x, half),  # type: ignore[misc]
            "torch float32": lambda x=x: torch.nn.functional.linear(x, real),  # type: ignore[misc]
            "torch CSR": lambda y=columns: torch_csr @ y,  # type: ignore[misc]
            "scipy CSR": lambda b=b: scipy_csr @ b,  # type: ignore[misc]
        }
        try:
            from sparse_dot_mkl import dot_product_mkl

            old = sparse.csr_matrix(scipy_csr)
            calls["MKL CSR"] = lambda old=old, b=b: dot_product_mkl(old, b)  # type: ignore[misc]
        except ImportError:
            pass
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                call()
                start = perf_counter()
                call()
                samples[name].append(perf_counter() - start)
        seconds = {name: median(each) for name, each in samples.items()}
        ours = seconds[next(name for name, form in forms.items() if isinstance(form, chosen))]
        ratios = {name: value / ours for name, value in seconds.items() if name not in forms}
        found[f"N = {n}"] = {"seconds": seconds, "chosen": chosen.__name__, "peers over chosen": ratios}
        print(f"{m}x{k}, {100 * sparsity:.0f} %, {threads} threads, N = {n}: {chosen.__name__} {1e3 * ours:.2f} ms;",
              ", ".join(f"{name} x{ratio:.2f}" for name, ratio in ratios.items()), flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="4096 x 4096 at 80 % only")
    given = parser.parse_args()
    matrices = ((4096, 4096),) if given.quick else ((4096, 4096), (11008, 4096))
    data: dict[str, Any] = {"evidence": "executed", "path": usable_path(), "load": os.getloadavg()[0]}
    for threads in given.threads:
        for m, k in matrices:
            for sparsity in (0.8,) if given.quick else (0.5, 0.7, 0.8, 0.9, 0.95):
                key = f"{m}x{k}, {100 * sparsity:.0f} %, {threads} threads"
                data[key] = measure(m, k, sparsity, threads, given.repeats)
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
