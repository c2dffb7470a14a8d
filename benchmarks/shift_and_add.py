"""MatShift and MatAdd on a processor beside products of PyTorch and straight loops, interleaved in one run.

    python benchmarks/shift_and_add.py [--threads 1 2] [--repeats 15]

Writes benchmarks/results/shift_and_add.json: median and least time of every side at the shapes of the released kernel
benchmarks, terms per second, and ratios of least times. "float32" is torch matmul, "int8" torch._int_mm (VNNI where the
processor has it), "fake shift" rebuilds float32 weights as sign * 2^p before torch matmul, "einsum" is torch.einsum,
and "loop" is one plain loop nest compiled for this processor's vectors and threaded, with variable shifts or skipped
rows. Packing of weights is outside the timed calls, packing of masks is shown with and without. Mixtures of a
multiplying and a shifting layer are timed beside their experts alone.

What to expect: shifts lose to int8 products wherever a processor multiplies four bytes per lane and cycle; masked sums
need not, because four positions of a mask share one addition. `slower_than_int8` says by how much.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bitwright.core.files import write_json
from bitwright.kernels.shift_and_add import (
    matadd,
    matadd_loop,
    matshift32,
    matshift_loop,
    pack_mask,
    pack_shifts,
    usable_path,
)
from bitwright.models.multiplication_primitives import MixtureOfPrimitives, PackedShiftLinear, ShiftLinear

RESULT = Path(__file__).parent / "results" / "shift_and_add.json"
SHIFTS = ((3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128))  # tokens, inputs, outputs
ADDITIONS = ((1, 3136, 32, 16), (2, 784, 32, 16), (5, 196, 32, 16))  # heads, tokens, columns of v, mask rows
GATE = 4.0  # times as slow as the loop, at most


def times(calls: dict[str, Callable[[], Any]], repeats: int, least_s: float = 2e-3) -> dict[str, dict[str, float]]:
    """Median and least seconds of every call, one after the other, `repeats` times; short calls are run several times
    in a row, for `least_s` together."""
    counts = {}
    for name, call in calls.items():
        call()
        start = perf_counter()
        call()
        counts[name] = max(1, int(least_s / max(perf_counter() - start, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()  # threads that the side before kept waiting for work go to sleep meanwhile
            start = perf_counter()
            for _ in range(counts[name]):
                call()
            found[name].append((perf_counter() - start) / counts[name])
    return {name: {"median_s": median(each), "least_s": min(each)} for name, each in found.items()}


def report(found: dict[str, dict[str, float]], terms: int, ours: str) -> dict[str, Any]:
    """Rates, and how many times as slow our kernel is as each other side (below 1: faster)."""
    for entry in found.values():
        entry["terms_per_s"] = terms / entry["least_s"]
    others = {f"slower_than_{name.replace(' ', '_')}": found[ours]["least_s"] / entry["least_s"]
              for name, entry in found.items() if not name.startswith(ours)}  # fmt: skip
    return {"sides": found, "terms": terms, **others, "gate_met": others["slower_than_loop"] <= GATE}


def shifts(tokens: int, inputs: int, outputs: int, threads: int, repeats: int) -> dict[str, Any]:
    """Exponents over all of -14 .. 0, a twentieth of the weights zero, activations of 16.16 fixed point within +-8."""
    rng = np.random.default_rng(0)
    x = rng.integers(-(1 << 19), 1 << 19, (tokens, inputs)).astype(np.int32)
    exponent = rng.integers(-14, 1, (outputs, inputs)).astype(np.int8)
    sign = (rng.choice([-1, 1], exponent.shape) * (rng.random(exponent.shape) >= 0.05)).astype(np.int8)
    packed = pack_shifts(exponent, sign)
    real, power, signs = (torch.from_numpy(each).float() for each in (x, exponent, sign))
    weight = torch.exp2(power) * signs
    bytes_x = torch.from_numpy(rng.integers(-127, 128, x.shape).astype(np.int8))
    bytes_w = torch.from_numpy(rng.integers(-127, 128, exponent.shape).astype(np.int8))
    if not np.array_equal(matshift32(x, packed, threads), matshift_loop(x, exponent, sign, threads)):
        raise SystemExit("matshift and the loop differ")
    found = times({
        "matshift": lambda: matshift32(x, packed, threads),
        "loop": lambda: matshift_loop(x, exponent, sign, threads),
        "float32": lambda: real @ weight.t(),
        "fake shift": lambda: real @ (torch.pow(2.0, power) * signs).t(),
        "int8": lambda: torch._int_mm(bytes_x, bytes_w.t()),
    }, repeats)  # fmt: skip
    return report(found, tokens * inputs * outputs, "matshift")


def additions(heads: int, tokens: int, columns: int, rows: int, threads: int, repeats: int) -> dict[str, Any]:
    """K^T V of one image: mask (heads, rows, tokens), half of it set, on v (heads, tokens, columns) of float32."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (heads, rows, tokens)).astype(np.uint8)
    v = rng.normal(size=(heads, tokens, columns)).astype(np.float32)
    packed, real, values = pack_mask(mask), torch.from_numpy(mask).float(), torch.from_numpy(v)
    upright = real.transpose(1, 2).contiguous()
    bytes_mask = torch.from_numpy(mask.astype(np.int8))
    bytes_v = torch.from_numpy(rng.integers(-127, 128, v.shape).astype(np.int8))
    sides: dict[str, Callable[[], Any]] = {
        "matadd": lambda: matadd(packed, v, threads),
        "matadd with packing": lambda: matadd(pack_mask(mask), v, threads),
        "loop": lambda: matadd_loop(mask, v, threads),
        "float32": lambda: real @ values,
        "einsum": lambda: torch.einsum("hnd,hne->hde", upright, values),
        "int8": lambda: [torch._int_mm(bytes_mask[head], bytes_v[head]) for head in range(heads)],
    }
    exact = mask @ v.astype(np.float64)
    if np.abs(matadd(packed, v, threads) - exact).max() > 1e-6 * np.abs(exact).max():
        raise SystemExit("matadd and the product differ")
    return report(times(sides, repeats), heads * rows * tokens * columns, "matadd")


def mixtures(tokens: int, inputs: int, outputs: int, repeats: int) -> dict[str, Any]:
    """A layer that multiplies, one that shifts natively, and a mixture of both that sends 60 % of the tokens to shifts:
    what finding and exchanging tokens adds to the experts' own time, by number of tokens."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs)
    shifting = PackedShiftLinear(ShiftLinear.from_linear(layer))
    mixture = MixtureOfPrimitives(inputs, outputs, (6.0, 4.0)).eval()
    mixture.experts[0], mixture.experts[1] = layer, shifting
    x = torch.randn(tokens, inputs)
    with torch.no_grad():
        leaning = mixture.router(x)
        mixture.router.bias[1] += torch.quantile(leaning[:, 0] - leaning[:, 1], 0.6)
        few, many = x[: round(0.4 * tokens)], x[round(0.4 * tokens) :]
        calls = {
            "multiply": lambda: layer(x),
            "shift": lambda: shifting(x),
            "mixture": lambda: mixture(x),
            "experts alone": lambda: (layer(few), shifting(many)),
        }
        found = times(calls, repeats)
    least = {name: entry["least_s"] for name, entry in found.items()}
    return {
        "sides": found,
        "latency_of_shift_over_multiply": least["shift"] / least["multiply"],
        "exchange_over_experts": least["mixture"] / least["experts alone"] - 1,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    data: dict[str, Any] = {}
    for threads in given.threads:
        torch.set_num_threads(threads)
        part = data.setdefault(f"{threads} threads", {})
        for tokens, inputs, outputs in SHIFTS:
            name = f"MatShift [1, {tokens}, {inputs}] -> {outputs}"
            part[name] = shifts(tokens, inputs, outputs, threads, given.repeats)
        for heads, tokens, columns, rows in ADDITIONS:
            name = f"MatAdd [1, {heads}, {tokens}, {columns}] by mask [1, {heads}, {tokens}, {rows}]"
            part[name] = additions(heads, tokens, columns, rows, threads, given.repeats)
        for tokens in (16, 196, 3136):
            part[f"mixture of {tokens} tokens, 64 -> 512"] = row = mixtures(tokens, 64, 512, given.repeats)
            slower, exchange = row["latency_of_shift_over_multiply"], 100 * row["exchange_over_experts"]
            print(f"{threads} threads, {tokens} tokens: shifts take {slower:.2f} x the time of multiplications, "
                  f"exchange adds {exchange:.0f} % to the experts")  # fmt: skip
        for name, row in part.items():
            if "terms" not in row:
                continue
            rates = ", ".join(f"{side} {each['terms_per_s'] / 1e9:.1f}" for side, each in row["sides"].items())
            print(f"{threads} threads, {name}: G terms/s: {rates}; {row['slower_than_loop']:.2f} x the loop's time, "
                  f"{row['slower_than_int8']:.1f} x that of int8", flush=True)  # fmt: skip
    write_json(RESULT, {
        "evidence": "executed", "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
        "instructions": usable_path(), "gate": f"at most {GATE:g} times as slow as the straight loop", **data,
    })  # fmt: skip
