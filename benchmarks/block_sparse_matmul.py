"""Block-sparse int8 products and the encoder on them beside their peers on this CPU, interleaved in one run.

    python benchmarks/block_sparse_matmul.py [--threads 1 2] [--repeats 15] [--quick]

Shapes (outputs x inputs) 256^2 to 4096 x 4096 by 16, 64, 80 and 384 tokens at 70 to 90 % of (4, 1) blocks dropped.
Peers compute the dense product in int8: PyTorch (oneDNN; of both orders of operands the faster) and, where installed,
ONNX Runtime (MatMulInteger). Sparse peers, in float32: scipy's CSR and BSR (4, 1), and MKL through sparse-dot-mkl where
installed. Slabs are set beside a plain matrix for many tokens, and the whole MiniLM, pruned to 80 %, beside torch
float32 with and without padding and the same int8 path without pruning. Writes
benchmarks/results/block_sparse_matmul.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy import sparse

from bitwright.kernels.block_sparse_cost import ZEN_5, vnni_cost
from bitwright.kernels.block_sparse_matmul import BlockCSR, aligned_zeros, matmul, slab_width, to_slabs, usable_path
from bitwright.reproduce.sparse_cpu import SPARSITIES, block_weights
from bitwright.reproduce.sparse_networks import minilm_times

RESULT = Path(__file__).parent / "results" / "block_sparse_matmul.json"
SHAPES = ((256, 256), (768, 768), (1024, 1024), (3072, 768), (768, 3072), (1024, 4096), (4096, 1024), (4096, 4096))
TOKENS = (16, 64, 80, 384)


def times(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of every call, one after the other, `repeats` times (each once untimed before)."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = perf_counter()
            call()
            found[name].append(perf_counter() - start)
    return {name: median(each) for name, each in found.items()}


def onnx_runtime(weights: np.ndarray, threads: int) -> Any:
    """A session of MatMulInteger, uint8 by int8; None without ONNX Runtime."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError:
        return None
    stored = helper.make_tensor("w", TensorProto.INT8, weights.T.shape, weights.T.tobytes(), raw=True)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    ends = [
        helper.make_tensor_value_info(name, kind, [None, size])
        for name, kind, size in (("x", TensorProto.UINT8, weights.shape[1]), ("y", TensorProto.INT32, len(weights)))
    ]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], [stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the cores to the other calls
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def mkl() -> Any:
    """MKL's sparse by dense product; None where it is not installed."""
    try:
        from sparse_dot_mkl import dot_product_mkl
    except ImportError:
        return None
    return dot_product_mkl


def measure(shape: tuple[int, int], tokens: int, threads: int, repeats: int) -> dict[str, Any]:
    """All sides of one shape: seconds by side, ours by sparsity."""
    torch.set_num_threads(threads)
    outputs, inputs = shape
    rng = np.random.default_rng(0)
    a = rng.integers(0, 128, (inputs, tokens)).astype(np.uint8)
    laid = to_slabs(a, slab_width(tokens))
    dense = block_weights(outputs, inputs, 0.0)
    x, w = torch.from_numpy(a.T.astype(np.int8)), torch.from_numpy(dense)
    padded = x if tokens > 16 else torch.nn.functional.pad(x, (0, 0, 0, 17 - tokens))
    a_int8 = torch.from_numpy(a.astype(np.int8))
    packed = {s: BlockCSR.from_dense(block_weights(outputs, inputs, s)) for s in (0.0, 0.5, *SPARSITIES)}
    out = aligned_zeros((len(laid), outputs, laid.shape[2]), np.int32)
    calls: dict[str, Callable[[], Any]] = {
        f"ours {100 * s:.0f} %": lambda w=w: matmul(w, laid, tokens=tokens, threads=threads, out=out)  # type: ignore[misc]
        for s, w in packed.items()
    }
    calls["torch int8, tokens first"] = lambda: torch._int_mm(padded, w.t())
    calls["torch int8, weights first"] = lambda: torch._int_mm(w, a_int8)
    if (session := onnx_runtime(dense, threads)) is not None:
        rows = np.ascontiguousarray(a.T)
        calls["ONNX Runtime int8"] = lambda: session(rows)
    real = a.astype(np.float32)
    for s in (0.8, 0.9):
        csr = sparse.csr_array(block_weights(outputs, inputs, s).astype(np.float32))
        calls[f"scipy CSR {100 * s:.0f} %"] = lambda csr=csr: csr @ real  # type: ignore[misc]
        bsr = csr.tobsr((4, 1))
        calls[f"scipy BSR {100 * s:.0f} %"] = lambda bsr=bsr: bsr @ real  # type: ignore[misc]
        if (product := mkl()) is not None:
            old = sparse.csr_matrix(csr)
            calls[f"MKL CSR {100 * s:.0f} %"] = lambda old=old: product(old, real)  # type: ignore[misc]
    found: dict[str, Any] = {"seconds": times(calls, repeats)}
    seconds = found["seconds"]
    best = min(value for name, value in seconds.items() if "int8" in name)
    found["over the best dense int8"] = {s: best / seconds[f"ours {100 * s:.0f} %"] for s in packed}
    for s in (0.8, 0.9):
        name = f"{100 * s:.0f} %"
        peers = [value for peer, value in seconds.items() if peer.endswith(name) and not peer.startswith("ours")]
        found[f"over the best sparse float32 {name}"] = min(peers) / seconds[f"ours {name}"]
    found["predicted with Zen 5 cores"] = {
        s: vnni_cost(outputs, inputs, tokens, s, ZEN_5, threads=threads).time_s for s in SPARSITIES
    }
    return found


def layouts(threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds at 80 % of slabs of several widths and of a plain matrix, by tokens; 1,024 x 1,024."""
    packed = BlockCSR.from_dense(block_weights(1024, 1024, 0.8))
    found = {}
    for tokens in (1024, 4096):
        a = np.random.default_rng(0).integers(0, 256, (1024, tokens)).astype(np.uint8)
        kept = {"plain": a} | {f"slabs of {width}": to_slabs(a, width) for width in (32, 64, 128, 256)}
        calls = {}
        for name, x in kept.items():
            out = aligned_zeros(x.shape, np.int32)
            calls[name] = lambda x=x, out=out: matmul(packed, x, threads=threads, out=out)  # type: ignore[misc]
        found[f"{tokens} tokens"] = times(calls, repeats)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="1,024 x 1,024 only")
    given = parser.parse_args()
    shapes = ((1024, 1024),) if given.quick else SHAPES
    data: dict[str, Any] = {"evidence": "executed", "path": usable_path(), "load": os.getloadavg()[0], "products": {}}
    for threads in given.threads:
        for shape in shapes:
            for tokens in TOKENS:
                key = f"{shape[0]}x{shape[1]}x{tokens}, {threads} threads"
                data["products"][key] = measure(shape, tokens, threads, given.repeats)
                ratios = data["products"][key]["over the best dense int8"]
                print(key, " ".join(f"{100 * s:.0f} %: x{ratio:.2f}" for s, ratio in ratios.items()), flush=True)
    data["layouts"] = {f"{threads} threads": layouts(threads, given.repeats) for threads in given.threads}
    data["MiniLM"] = {
        f"{sentences} sentences, {threads} threads": minilm_times(0.8, sentences, given.repeats, threads)
        for threads in given.threads
        for sentences in (1, 8, 64)
    }
    for name, row in (data["layouts"] | data["MiniLM"]).items():
        print(name, row)
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
