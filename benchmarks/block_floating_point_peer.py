"""Block floating point beside dmx-compressor's, value for value, and why the few that differ do.

    python -m venv peer && peer/bin/pip install torch==2.13.0 'transformers<4.50' 'huggingface-hub<1' 'accelerate<2' \
        'datasets<5' 'evaluate<0.5' scikit-optimize==0.10.2 bidict parse tabulate tqdm pptree graphviz ninja setuptools
    peer/bin/pip install --no-deps dmx-compressor     # its torchvision is not needed; it compiles its rounding with g++
    python benchmarks/block_floating_point_peer.py --peer peer/bin/python

The peer pins older packages, so it runs in its own interpreter and values go through .npy files. Its rounding adds
6 * 2^e to a value in float32, rounds that sum to p mantissa bits, and subtracts again; `peer_rounding` repeats those
steps in numpy. A difference counts as explained when that repetition gives the peer's value and the cause is one of:

- "rounded twice": the float32 sum already rounds, here onto a tie, and the tie goes to the other neighbour;
- "sum overflows": 6 * 2^e is beyond float32 for e of 126 and 127, and every value of the block becomes the same limit;
- "subnormal maximum": the peer takes 2^e as 0 and cuts the bits of subnormal values instead of rounding to a step.

Writes benchmarks/results/block_floating_point_peer.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.arithmetic import formats
from bitwright.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "block_floating_point_peer.json"
MANTISSAS, BLOCKS = (4, 6, 8), (16, 32, 64, 128)
VALUES = 1 << 20
_PEER = """
import json, sys
from importlib.metadata import version
import numpy, torch
from dmx.compressor.numerical import Format
folder, names = sys.argv[1], json.loads(sys.argv[2])
x = torch.from_numpy(numpy.load(folder + "/x.npy"))
for at, name in enumerate(names):
    numpy.save(f"{folder}/{at}.npy", Format.from_shorthand(name).cast(x, -1).contiguous().numpy())
with open(folder + "/versions.json", "w") as file:
    json.dump({name: version(name) for name in ("dmx-compressor", "torch")}, file)
"""
Reals = NDArray[np.float32]


def inputs(rng: np.random.Generator) -> dict[str, Reals]:
    """Rows of 128 values by kind; `VALUES` of the first, fewer of the others."""
    rows = VALUES // 128
    normal = rng.standard_t(3, (rows, 128)) * np.exp2(rng.integers(-100, 100, (rows, 1)))
    few = (rows // 16, 128)
    top = np.exp2(rng.integers(-20, 20, (few[0], 1)))
    halves = rng.integers(-15, 16, few) / 8.0  # halves of the step of p = 4 below a maximum of 1.xx
    halves[:, ::16] = 1.75
    long_halves = rng.integers(-255, 256, few) / 128.0
    long_halves[:, ::16] = 1.0
    zeros = rng.normal(size=few) * (rng.random((few[0], 8, 1)) < 0.5).repeat(16, 1).reshape(few)
    negative = -np.abs(rng.normal(size=few))
    negative[:, ::16] = -np.exp2(rng.integers(0, 3, negative[:, ::16].shape))
    return {
        "normal numbers": normal.astype(np.float32),
        "ties of p = 4": (halves * top).astype(np.float32),
        "ties of p = 8": (long_halves * top).astype(np.float32),
        "blocks of zeros": zeros.astype(np.float32),
        "powers of two": (np.exp2(rng.integers(-6, 7, few)) * rng.choice([-1, 1], few) * top).astype(np.float32),
        "negative maxima": negative.astype(np.float32),
        "just below a power of two": (np.nextafter(np.float32(2), np.float32(0)) * rng.choice([-1, 1], few)).astype(
            np.float32
        ),
        "subnormal values, normal maxima": np.where(
            np.arange(128) % 16 == 0, np.float32(1e-37), rng.normal(size=few) * 1e-39
        ).astype(np.float32),
        "subnormal maxima": (rng.normal(size=few) * 1e-40).astype(np.float32),
        "maxima of 2^126 and above": (np.clip(rng.normal(size=few), -1.9, 1.9) * 2.0**126).astype(np.float32),
    }


def peer_rounding(x: Reals, mantissa: int, block: int) -> Reals:
    """The peer's values of x (rows, 128), by its arithmetic."""
    rows = x.reshape(-1, block)
    largest = np.abs(rows).max(axis=1, keepdims=True).view(np.uint32)
    power = (largest & np.uint32(0x7F800000)).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        shift = power * np.float32(6)
        sums = rows + shift
        bits = sums.view(np.uint32)
        half = np.uint32(1 << (22 - mantissa))
        tie = ((bits & np.uint32((1 << (23 - mantissa)) - 1)) == half) & (bits >> np.uint32(23 - mantissa) & 1 == 0)
        raised = (bits + np.where(tie, np.uint32(0), half)) & ~np.uint32((1 << (23 - mantissa)) - 1)
        found = (raised.view(np.float32) - shift).astype(np.float32)
    above = (found.view(np.uint32) & np.uint32(0x7F800000)) > power.view(np.uint32)
    kept = ((1 << (mantissa - 2)) - 1) << (25 - mantissa)
    limit = (power.view(np.uint32) | np.uint32(kept)) | (found.view(np.uint32) & np.uint32(0x80000000))
    found = np.where(above, limit.view(np.float32), found)
    return found.reshape(x.shape)


def causes(x: Reals, mantissa: int, block: int, differs: NDArray[np.bool_], repeated: Reals, peer: Reals) -> Any:
    """How many differences each cause explains; "unexplained" for the rest."""
    rows = x.reshape(-1, block)
    exponent = np.frexp(np.abs(rows).max(axis=1, keepdims=True))[1] - 1
    e = np.broadcast_to(exponent, rows.shape).reshape(x.shape)
    same = (repeated == peer) | (np.isnan(repeated) & np.isnan(peer))
    step = np.exp2(e - mantissa + 2.0)
    shift = np.where(e < 126, 6 * np.exp2(e.astype(np.float64)), 0.0)
    once = (x + shift.astype(np.float32)).astype(np.float64) - shift
    onto_tie = ((once / step) % 1 == 0.5) & ((x.astype(np.float64) / step) % 1 != 0.5)
    found = {
        "rounded twice": differs & same & onto_tie & (e >= -126) & (e < 126),
        "sum overflows": differs & same & (e >= 126),
        "subnormal maximum": differs & same & (e < -126),
    }
    counts = {name: int(mask.sum()) for name, mask in found.items()}
    counts["unexplained"] = int((differs & ~np.logical_or.reduce(list(found.values()))).sum())
    return {name: count for name, count in counts.items() if count or name == "unexplained"}


def compare(python: str) -> dict[str, Any]:
    """Every kind of values in every format, ours against the peer's."""
    kinds = inputs(np.random.default_rng(0))
    names = [(p, n) for p in MANTISSAS for n in BLOCKS]
    with tempfile.TemporaryDirectory() as folder:
        whole = np.concatenate(list(kinds.values()))
        np.save(Path(folder) / "x.npy", whole)
        shorthands = json.dumps([f"BFP[{p}|8]{{{n}}}(SN)" for p, n in names])
        search = f"{Path(python).absolute().parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for its ninja
        subprocess.run([python, "-c", _PEER, folder, shorthands], check=True, timeout=1800, cwd=folder,
                       env={**os.environ, "PATH": search})  # fmt: skip
        peers = [np.load(Path(folder) / f"{at}.npy") for at in range(len(names))]
        versions = json.loads((Path(folder) / "versions.json").read_text())
    rows: dict[str, dict[str, Any]] = {}
    for (p, n), peer in zip(names, peers, strict=True):
        start = 0
        for kind, x in kinds.items():
            theirs, start = peer[start : start + len(x)], start + len(x)
            ours = formats.fake_quantise(formats.parse(f"bfp{p + 8}_{n}"), x)
            differs = ~(ours == theirs)
            row = rows.setdefault(kind, {"values": 0, "equal": 0, "causes": {}})
            row["values"] += x.size
            row["equal"] += int((~differs).sum())
            for cause, count in causes(x, p, n, differs, peer_rounding(x, p, n), theirs).items():
                row["causes"][cause] = row["causes"].get(cause, 0) + count
    return {"evidence": "executed", "peer": versions, "mantissas": MANTISSAS, "blocks": BLOCKS, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a Python interpreter that has dmx-compressor")
    result = compare(parser.parse_args().peer)
    for kind, row in result["rows"].items():
        print(f"{kind:34s} {row['equal']:>9d} of {row['values']:>9d} equal", row["causes"])
    write_json(RESULTS, result)
