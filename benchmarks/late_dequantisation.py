"""Products with 4-bit weights, late dequantisation beside its peers on this CPU, interleaved in one run.

    python benchmarks/late_dequantisation.py [--threads 1 2] [--rows 1 8 64] [--repeats 15]

Weights 4096 x 4096, round to nearest in groups of 128, the same for all. Peers: PyTorch int8 (W8A8, what VNNI gives
without packing), PyTorch's int4 weight-only product, ONNX Runtime MatMulNBits (where installed; float activations, and
accuracy level 4, which rounds them to int8), dequantising every weight to float32 and then multiplying (each time, and
with the float32 weights kept), and our kernel with every weight dequantised in the innermost loop. Errors are relative
to float64 products of the dequantised weights. Writes benchmarks/results/late_dequantisation.json.
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

from bitwright.arithmetic.late_dequantisation import GroupedWeights, quantise_tokens, quantise_weights
from bitwright.kernels.late_dequantisation import matmul, matmul_early, pack, usable_path

RESULT = Path(__file__).parent / "results" / "late_dequantisation.json"
K = N = 4096
GROUP = 128


def torch_int4(weights: GroupedWeights) -> Any:
    """PyTorch's CPU product with packed int4 weights, in bfloat16, which it has fast code for; None without it."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.from_numpy(weights.codes.T.astype(np.int32)), 1)
    # weight = (code - 8) * scale + zero
    zero = weights.scale * (8 - weights.zero.astype(np.float32))
    tables = torch.from_numpy(np.stack([weights.scale, zero], axis=-1)).contiguous().bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, GROUP, tables).float()


def onnx_runtime(weights: GroupedWeights, threads: int, level: int) -> Any:
    """A session with one MatMulNBits; None without ONNX Runtime."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError:
        return None
    codes = weights.codes.T.reshape(N, K // GROUP, GROUP)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    zero = weights.zero.T
    zeros = (zero[:, ::2] | zero[:, 1::2] << 4).astype(np.uint8)

    def tensor(name: str, kind: int, values: np.ndarray) -> Any:
        return helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True)

    scales = tensor("scales", TensorProto.FLOAT, weights.scale.T.reshape(-1))
    byte = TensorProto.UINT8
    tensors = [tensor("B", byte, packed), scales, tensor("zeros", byte, zeros.reshape(-1))]
    sizes = {"K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["A", "B", "scales", "zeros"], ["Y"], domain="com.microsoft", **sizes)
    real = TensorProto.FLOAT
    ends = [[helper.make_tensor_value_info(name, real, [None, size])] for name, size in (("A", K), ("Y", N))]
    graph = helper.make_graph([node], "product", *ends, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves the cores to the other calls
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"A": x})[0]


def times(calls: dict[str, Any], repeats: int) -> dict[str, dict[str, float]]:
    """Median and least seconds of every call, one after the other, `repeats` times: five calls each, the first of them
    not timed, so that the others find in the caches what it left there."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            for _ in range(4):
                start = perf_counter()
                call()
                found[name].append(perf_counter() - start)
    return {name: {"median_s": median(each), "least_s": min(each)} for name, each in found.items()}


def measure(rows: int, threads: int, repeats: int) -> dict[str, Any]:
    """All products with `rows` rows of activations."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    weights = quantise_weights(rng.normal(0, 0.02, (K, N)), group=GROUP)
    x = rng.normal(size=(rows, K)).astype(np.float32)
    real, packed = torch.from_numpy(x), pack(weights)
    codes, token = quantise_tokens(x)
    kept = torch.from_numpy(weights.dequantise().astype(np.float32))
    q, scale, zero = (torch.from_numpy(each) for each in (weights.codes, weights.scale, weights.zero))
    int8 = torch.from_numpy(np.clip(np.rint(kept.numpy() / np.abs(kept.numpy()).max(axis=0) * 127), -127, 127)
                            .astype(np.int8))  # fmt: skip
    int8_scale = torch.from_numpy(np.abs(kept.numpy()).max(axis=0) / 127)
    acts = torch.from_numpy(codes) if rows > 16 else torch.from_numpy(np.pad(codes, ((0, 17 - rows), (0, 0))))
    token_torch = torch.from_numpy(token)[:, None]

    def dequantised() -> torch.Tensor:
        groups = q.view(K // GROUP, GROUP, N).float()
        return real @ ((groups - zero[:, None]) * scale[:, None]).view(K, N)

    calls: dict[str, Any] = {
        "late, int8 activations": lambda: matmul(codes, packed, token, threads),
        "late, int8, rounding activations too": lambda: matmul(*_packed_first(quantise_tokens(x), packed), threads),
        "late, float activations": lambda: matmul(x, packed, threads=threads),
        "early, float activations": lambda: matmul_early(x, packed, threads),
        "dequantise, then matmul": dequantised,
        "float32 weights kept": lambda: real @ kept,
        "torch int8": lambda: torch._int_mm(acts[: max(rows, 17)], int8)[:rows].float() * int8_scale * token_torch,
    }
    if (int4 := torch_int4(weights)) is not None:
        calls["torch int4 weights"] = lambda: int4(real)
    for level in (0, 4):
        if (session := onnx_runtime(weights, threads, level)) is not None:
            calls[f"ONNX Runtime MatMulNBits, level {level}"] = lambda session=session: session(x)
    found: dict[str, Any] = times(calls, repeats)
    expected = x.astype(np.float64) @ weights.dequantise()
    for name, call in calls.items():
        found[name]["relative_error"] = float(np.abs(np.asarray(call()) - expected).max() / np.abs(expected).max())
        found[name]["times_as_long_as_late_int8"] = found[name]["least_s"] / found["late, int8 activations"]["least_s"]
    return found


def _packed_first(tokens: tuple[Any, Any], packed: Any) -> tuple[Any, Any, Any]:
    return tokens[0], packed, tokens[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    data = {f"{threads} threads": {f"M = {rows}": measure(rows, threads, given.repeats) for rows in given.rows}
            for threads in given.threads}  # fmt: skip
    for threads_name, sizes in data.items():
        for size, rows_found in sizes.items():
            print(f"{threads_name}, {size}")
            for name, row in rows_found.items():
                print(f"  {name:40s} {row['least_s'] * 1e3:8.3f} ms  x{row['times_as_long_as_late_int8']:.2f}  "
                      f"error {row['relative_error']:.1e}")  # fmt: skip
    result = {"evidence": "executed", "k": K, "n": N, "group": GROUP, "path": usable_path(), **data}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
