"""Memory of activations against step time: 8-bit activations beside what a user would pick instead.

    python benchmarks/kept_activations.py [--size S] [--batch 8] [--threads 1 2] [--repeats 9]

Training steps (forward, backward, no optimiser) of a DeiT on random images. Step times: medians, the methods one after
the other and again in one process. Kept bytes: what autograd holds after the forward pass. Peak: resident bytes of a
process of its own that runs two steps of one method, less those before the model is built; tensors of 64 KiB and more
are given back to the system when they are freed (MALLOC_MMAP_THRESHOLD_), so that fragments of the heap do not count.
Peers: plain float32, fused attention, bfloat16 autocast, `torch.utils.checkpoint` of every block. Writes
benchmarks/results/kept_activations.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bitwright.core.files import write_json
from bitwright.models.compressed_activations import Packer, Setting, compress, compressed_activations
from bitwright.models.kept_activations import kept_bytes
from bitwright.models.vision_transformer import VisionTransformer, deit

RESULT = Path(__file__).parent / "results" / "kept_activations.json"
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
HEADS = {"Ti": 3, "S": 6, "B": 12}


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def methods(size: str) -> dict[str, tuple[VisionTransformer, Callable[[], Any]]]:
    """Models and the context of their forward pass, by method."""
    torch.manual_seed(0)
    plain, fused = deit(size), deit(size, fused=True)
    heads = HEADS[size]
    checkpointed = copy.deepcopy(plain)
    checkpointed.blocks = nn.Sequential(*(Checkpointed(block) for block in checkpointed.blocks))
    packers = {bits: Packer(Setting(bits, heads)) for bits in (8, 4)}
    on_fused = Packer(Setting(8, heads))
    return {
        "float32": (plain, nullcontext),
        "8 bits, layers": (compress(copy.deepcopy(plain), Setting(groups=heads, share=False)), nullcontext),
        "8 bits, layers, shared": (compress(copy.deepcopy(plain), Setting(groups=heads)), nullcontext),
        "8 bits, hooks": (plain, lambda: compressed_activations(packer=packers[8])),
        "4 bits, hooks": (plain, lambda: compressed_activations(packer=packers[4])),
        "fused attention": (fused, nullcontext),
        "fused attention, 8 bits, hooks": (fused, lambda: compressed_activations(packer=on_fused)),
        "bfloat16 autocast": (plain, lambda: torch.autocast("cpu", torch.bfloat16)),
        "checkpoint of blocks": (checkpointed, nullcontext),
    }  # fmt: skip


def step(model: nn.Module, context: Callable[[], Any], images: torch.Tensor, labels: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    start = perf_counter()
    model.zero_grad()
    with context():
        loss = nn.functional.cross_entropy(model(images).float(), labels)
    loss.backward()
    return perf_counter() - start


def memory(field: str) -> int:
    """Bytes of this process in a field of /proc/self/status: resident now (VmRSS) or at their peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def child(size: str, batch: int, name: str) -> None:
    """Print the resident bytes that two steps of one method need at their peak."""
    torch.set_num_threads(1)
    before = memory("VmRSS")
    model, context = methods(size)[name]
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    for _ in range(2):
        step(model, context, images, labels)
    print(memory("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=HEADS, default="S")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.size, given.batch, given.child)
        return
    images, labels = torch.randn(given.batch, 3, 224, 224), torch.randint(0, 1000, (given.batch,))
    sides = methods(given.size)
    rows: dict[str, dict[str, Any]] = {name: {} for name in sides}
    for threads in given.threads:
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(given.repeats + 1):
            for name, (model, context) in sides.items():
                taken = step(model, context, images, labels)
                if repeat:
                    times[name].append(taken)
        for name, each in times.items():
            rows[name][f"step_s, {threads} threads"] = median(each)
            rows[name][f"times as long as float32, {threads} threads"] = median(each) / median(times["float32"])
    for name, (model, context) in sides.items():

        def run(model: nn.Module = model, context: Callable[[], Any] = context) -> Any:
            with context():
                return model(images)

        rows[name]["kept_bytes"] = kept_bytes(model, run).total
        rows[name]["kept over float32"] = rows[name]["kept_bytes"] / rows["float32"]["kept_bytes"]
        command = [sys.executable, __file__, "--size", given.size, "--batch", str(given.batch), "--child", name]
        rows[name]["peak_bytes"] = int(
            subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
        )
    for name, row in rows.items():
        ratios = ", ".join(f"x{row[f'times as long as float32, {t} threads']:.2f} on {t}" for t in given.threads)
        print(f"{name:32s} kept {row['kept_bytes'] / 2**20:8.1f} MiB (x{row['kept over float32']:.3f})  "
              f"peak {row['peak_bytes'] / 2**20:7.0f} MiB  time {ratios}")  # fmt: skip
    write_json(RESULT, {"evidence": "executed", "network": f"DeiT-{given.size}", "batch": given.batch, "methods": rows})


if __name__ == "__main__":
    main()
