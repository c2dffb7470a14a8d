"""Number formats: values encoded, decoded, packed and unpacked per second on one core, beside ml_dtypes and PyTorch.

    python benchmarks/number_formats.py [--values 100000000]

Writes benchmarks/results/number_formats.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np
import torch

from bitwright.arithmetic import formats

RESULT = Path(__file__).parent / "results" / "number_formats.json"
NAMES = (
    "int8/row", "int4/32", "uint4/32", "fp8_e4m3/row", "fp8_e4m3/none", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8",
    "bfp12_32", "shift5/row", "lmul_e4m3/row", "bipolar2/row", "bipolar4/row", "ovp4/row", "ovp8/row",
)  # fmt: skip
SEARCHED = ("bipolar4/32", "ovp4/32", "ovp4/128")  # a scale is searched for every few values; a tenth of the values


def rate(call: Callable[[], Any], values: int, repeats: int = 3) -> tuple[float, Any]:
    """Values per second (best of `repeats`) and the last result."""
    best, made = float("inf"), None
    for _ in range(repeats):
        start = perf_counter()
        made = call()
        best = min(best, perf_counter() - start)
    return values / best, made


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--values", type=int, default=100_000_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    x = np.random.default_rng(0).normal(size=(given.values // 4096, 4096)).astype(np.float32)
    data: dict[str, Any] = {}
    for name in (*NAMES, *SEARCHED):
        form, part = formats.parse(name), x[: len(x) // 10] if name in SEARCHED else x
        encode, encoded = rate(lambda form=form, part=part: form.encode(part), part.size)
        decode, _ = rate(lambda form=form, encoded=encoded: form.decode(encoded), part.size)
        pack, packed = rate(lambda form=form, encoded=encoded: form.pack(encoded), part.size)
        unpack, _ = rate(lambda form=form, part=part, packed=packed: form.unpack(packed, part.shape), part.size)
        data[name] = {"encode_per_s": encode, "decode_per_s": decode, "pack_per_s": pack, "unpack_per_s": unpack}
    data["ml_dtypes float8_e4m3fn"] = {"encode_per_s": rate(lambda: x.astype(ml_dtypes.float8_e4m3fn), x.size)[0]}
    tensor = torch.from_numpy(x)
    data["torch float8_e4m3fn"] = {"encode_per_s": rate(lambda: tensor.to(torch.float8_e4m3fn), x.size)[0]}
    peer = data["torch float8_e4m3fn"]["encode_per_s"]
    for name, row in data.items():
        row["encode_over_torch"] = row["encode_per_s"] / peer
        print(name, {key: f"{value / 1e6:.0f} M/s" if key.endswith("per_s") else f"{value:.2f}"
                     for key, value in row.items()})  # fmt: skip
    RESULT.write_text(json.dumps({"evidence": "executed", "values": x.size, "threads": 1, **data}, indent=1) + "\n")
