"""System 18: Lean Attention, stream-K scheduling of exact attention for decoding (arXiv 2405.10480)."""

from __future__ import annotations

from functools import cache as remember
from functools import partial
from itertools import product
from statistics import geometric_mean, mean

import numpy as np
import torch

from bitwright.core import cache
from bitwright.core.machine import load_machine
from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels import attention_partition as partitions
from bitwright.kernels.attention_merge import merge
from bitwright.kernels.decode_attention import decode_attention
from bitwright.kernels.decode_attention_cost import (
    DecodeShape,
    crossover,
    simulate_causal_prefill,
    simulate_decode,
    speed_up,
)
from bitwright.models.decoder import generate
from bitwright.models.load import load, weight_paths
from bitwright.models.partitioned_decoding import partitioned_decoding
from bitwright.reproduce.claims import Claim

STATUS = "started"
ENTRY_POINTS = (
    "bitwright.kernels.attention_partition.lean",
    "bitwright.kernels.decode_attention.decode_attention",
    "bitwright.kernels.attention_merge.merge",
    "bitwright.kernels.decode_attention_cost.simulate_decode",
    "bitwright.models.partitioned_decoding.partitioned_decoding",
)
MACHINES = ("a100-80g", "h100-sxm")
# All steps of decoding that averages run over; 128 channels per head, as many key-value heads as heads.
BATCHES, HEADS = (1, 2, 4, 8), (8, 16, 32, 40, 56)
CONTEXTS = tuple(1 << power for power in range(10, 19))
_BASELINES = {"whole": "FlashAttention-2", "fixed": "flash-decoding, two slots per unit",
              "fixed-early": "flash-decoding, one slot per unit"}  # fmt: skip
_FIRST = "arXiv 2405.10480 version 1, abstract"
_LATER = "arXiv 2405.10480, later version, abstract"
_GRID = "the published shapes could not be read; ours are batch 1 to 8, 8 to 56 heads, 1k to 256k tokens"


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    rows = q[0].double().view(k.shape[1], -1, q.shape[2])
    weights = torch.softmax(rows @ k[0, :, :length].double().mT * q.shape[2] ** -0.5, -1)
    return (weights @ v[0, :, :length].double()).view(q.shape[1], -1)


def exact_partitions() -> tuple[int, int]:
    """Outputs within 1e-5 of float64, of all: every number of workers, three schedules, three types of cache."""
    generator = torch.Generator().manual_seed(0)
    right = tried = 0
    for (heads, kv_heads, channels, length), kind in product(
        ((1, 1, 64, 200), (8, 1, 128, 333), (6, 2, 80, 97)), (torch.float32, torch.float16, torch.bfloat16)
    ):
        q = torch.randn(1, heads, channels, generator=generator)
        k, v = (torch.randn(1, kv_heads, length + 5, channels, generator=generator).to(kind) for _ in range(2))
        expected = _reference(q, k, v, length)
        total = int(partitions.tiles_of([length], kv_heads, 16).sum())
        for schedule, workers in product(partitions.SCHEDULES, range(1, total + 1)):
            found = decode_attention(q, k, v, [length], schedule=schedule, workers=workers, tile=16)
            right += bool((found[0] - expected).abs().max() < 1e-5)
            tried += 1
    return right, tried


def same_bits(runs: int = 10) -> tuple[int, int]:
    """Runs on two threads whose result has the bits of one thread's, of all."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, 64, generator=generator)
    k, v = (torch.randn(2, 2, 5000, 64, generator=generator) for _ in range(2))
    first = decode_attention(q, k, v, [5000, 777], workers=8, threads=1)
    found = [decode_attention(q, k, v, [5000, 777], workers=8, threads=2) for _ in range(runs)]
    return sum(torch.equal(first, each) for each in found), runs


def sound_partitions(count: int = 2000) -> tuple[int, int]:
    """Random partitions that cover every tile once, with loads that differ by at most one, maps that agree, and no
    more splits than the bound, of all."""
    rng = np.random.default_rng(0)
    right = 0
    for _ in range(count):
        tiles = rng.integers(0, 50, rng.integers(1, 20))
        made = partitions.lean(tiles, int(rng.integers(1, 200)))
        pieces = made.pieces
        seen = np.bincount(pieces.block, pieces.count, minlength=len(tiles))
        line = made.worker_of(np.arange(made.total))
        right += bool(
            (seen == tiles).all()
            and np.ptp(made.loads) <= 1
            and (np.bincount(line, minlength=made.workers) == made.loads).all()
            and made.splits.max(initial=0) <= partitions.split_bound(made.total, int(tiles.max()), made.workers)
        )
    return right, count


def merge_order(count: int = 200) -> float:
    """Largest difference of partial results merged in another order and grouping, relative to their size."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(count):
        parts = [(rng.normal(size=(3, 8)), rng.normal(size=3) * 30) for _ in range(5)]
        one, other = merge(parts), merge([merge(parts[:1:-1]), merge(parts[:2])])
        worst = max(worst, *(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, other, strict=True)))
    return worst


def same_tokens(new: int = 48) -> tuple[int, int]:
    """Tokens that SmolLM2-135M continues a prompt by, equal to those with PyTorch's attention, of all; cached."""

    def compute() -> list[int]:
        loaded = load("smollm2-135m")
        ids = torch.tensor([loaded.text_tokenizer.encode("In the beginning of the long road, the king said").ids])
        plain = generate(loaded.decoder, ids, new)
        lean = generate(partitioned_decoding(loaded.decoder), ids, new)
        return [int((plain == lean).sum()) - ids.shape[1], plain.shape[1] - ids.shape[1]]

    inputs = {"version": 1, "weights": [cache.file_digest(path) for path in weight_paths("smollm2-135m")], "new": new}
    right, tried = cache.get_or_compute("lean-attention-tokens", inputs, compute)
    return int(right), int(tried)


@remember
def speed_ups(machine: str, over: str) -> dict[tuple[int, int, int], float]:
    """Simulated time of a baseline over that of lean, by (batch, heads, context)."""
    device = load_machine(machine).device()
    return {
        (batch, heads, context): speed_up(device, DecodeShape((context,) * batch, heads, heads, 128), over)
        for batch, heads, context in product(BATCHES, HEADS, CONTEXTS)
    }


def _published(value: float, unit: str, where: str) -> Quantity:
    return Quantity(value, unit, Evidence.PUBLISHED, where)


def _share(counted: tuple[int, int]) -> Quantity:
    return Quantity(100 * counted[0] / counted[1], "%", Evidence.EXECUTED, f"{counted[0]} of {counted[1]}")


def _average(machine: str, over: str) -> Quantity:
    found = list(speed_ups(machine, over).values())
    text = f"geometric mean x{geometric_mean(found):.2f}, x{min(found):.2f} to x{max(found):.2f}, {len(found)} steps"
    return Quantity(mean(found), "x", Evidence.SIMULATED, text)


def _largest(machine: str, over: str, context: int) -> Quantity:
    found = {key: value for key, value in speed_ups(machine, over).items() if key[2] == context}
    (batch, heads, _), value = max(found.items(), key=lambda item: item[1])
    return Quantity(value, "x", Evidence.SIMULATED, f"batch {batch}, {heads} heads")


def _at_512k(machine: str) -> Quantity:
    device = load_machine(machine).device()
    found = {heads: speed_up(device, DecodeShape((1 << 19,), heads, heads, 128), "whole") for heads in (26, 32, 40)}
    text = ", ".join(f"{heads} heads x{value:.2f}" for heads, value in found.items())
    return Quantity(found[32], "x", Evidence.SIMULATED, f"32 heads, batch 1 ({text})")


def _occupancy(machine: str) -> Quantity:
    device = load_machine(machine).device()
    runs = [
        simulate_decode(device, DecodeShape((context,) * batch, heads, heads, 128))
        for batch, heads, context in product(BATCHES, HEADS, [each for each in CONTEXTS if each >= 16384])
    ]
    least = min(run.occupancy for run in runs)
    merging = max(run.merge_share for run in runs)
    tokens = crossover(device, 32, 128)
    text = (f"mean {mean(run.occupancy for run in runs):.3f}, largest merge share {merging:.3f}; faster than "
            f"flash-decoding from {tokens} tokens on at 32 heads")  # fmt: skip
    return Quantity(100 * least, "%", Evidence.SIMULATED, text)


def ragged_lengths(count: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of a ragged batch: one long sequence, the others log-uniform from 256 tokens to an eighth of it."""
    rng = np.random.default_rng(seed)
    return (longest, *np.exp(rng.uniform(np.log(256), np.log(longest / 8), count - 1)).astype(int).tolist())


def _ragged(machine: str, over: str) -> Quantity:
    device = load_machine(machine).device()
    found = [speed_up(device, DecodeShape(ragged_lengths(8, 65536, seed), 32, 8, 128), over) for seed in range(20)]
    text = f"x{min(found):.2f} to x{max(found):.2f}; 8 sequences up to 65,536 tokens, 32 heads over 8"
    return Quantity(mean(found), "x", Evidence.SIMULATED, text)


def _prefill(machine: str, tokens: int) -> Quantity:
    device = load_machine(machine).device()
    whole, lean = (simulate_causal_prefill(device, tokens, 32, 128, name).time_s for name in ("whole", "lean"))
    return Quantity(whole / lean, "x", Evidence.SIMULATED, "one sequence, 32 heads, 128 queries by 64 keys")


def _merge_law() -> Quantity:
    return Quantity(merge_order(), "", Evidence.EXECUTED, "relative, float64, 200 sets of 5 parts")


def claims() -> tuple[Claim, ...]:
    """Exactness, schedules, and simulated GPUs. CPU speed is in `benchmarks/decode_attention.py`."""
    exact = "exact by associativity: arXiv 2405.10480, section on softmax rescaling"
    found = [
        Claim("partitions within 1e-5 of float64", "all numbers of workers, lean, fixed and whole; fp32, fp16, bf16",
              _published(100, "%", exact), lambda: _share(exact_partitions()), 0.0),
        Claim("runs with the same bits", "two threads against one, fixed number of workers",
              _published(100, "%", "split order is fixed in the release"), lambda: _share(same_bits()), 0.0),
        Claim("sound schedules", "every tile once, equal loads, maps agree, splits within the bound",
              _published(100, "%", "released scheduling code"), lambda: _share(sound_partitions()), 0.0),
        Claim("difference between merge orders", "commuted and regrouped parts",
              _published(0, "", exact), _merge_law, None, "rounding of float64"),
        Claim("tokens equal to plain attention's", "SmolLM2-135M, 48 new tokens, greedy",
              _published(100, "%", exact), lambda: _share(same_tokens()), 0.0),
    ]  # fmt: skip
    for machine in MACHINES:
        found += [
            Claim("average speed over FlashAttention-2", f"decoding, {machine}", _published(2.6, "x", _FIRST),
                  partial(_average, machine, "whole"), None, _GRID),
            Claim("speed over FlashAttention-2 at 512k tokens", machine, _published(8.33, "x", _FIRST),
                  partial(_at_512k, machine), 0.25, "the shape is not named: one worker per head leaves slots idle"),
            Claim("least occupancy of the slots", f"16k tokens and more, {machine}",
                  _published(100, "%", "near-perfect occupancy irrespective of context length: abstract"),
                  partial(_occupancy, machine), 0.05,
                  "with 8 heads the release starts fewer than two workers per unit, and merging 16k tokens counts"),
            Claim("speed of causal prefill over FlashAttention-2", f"1k tokens, {machine}",
                  _published(1.0, "x", "not published as a figure; above 1 at short context"),
                  partial(_prefill, machine, 1024), None,
                  "partial results of 128 rows are written and read: where the machine file states no bandwidth of "
                  "the L2 cache they go to main memory, and splitting a short prompt costs more than it saves"),
            Claim("speed of causal prefill over FlashAttention-2", f"16k tokens, {machine}",
                  _published(1.0, "x", "not published as a figure; little gain at long context"),
                  partial(_prefill, machine, 16384), None),
            Claim("speed in ragged batches", f"over FlashAttention-2, {machine}",
                  _published(2.0, "x", "2x and more: authors' summary"), partial(_ragged, machine, "whole"), None,
                  "one long sequence leaves most workers of whole heads idle; the published lengths are not named"),
            Claim("speed in ragged batches", f"over flash-decoding of today, {machine}",
                  _published(2.0, "x", "2x and more: authors' summary"), partial(_ragged, machine, "fixed"), None,
                  "parts of a fixed number are as unequal as the sequences"),
            Claim("speed in ragged batches", f"true lengths over the longest for all, {machine}",
                  _published(1.0, "x", "not published: the release counts the longest"),
                  partial(_ragged, machine, "lean-padded"), None),
        ]  # fmt: skip
        for over in ("fixed", "fixed-early"):
            name = _BASELINES[over]
            found += [
                Claim("average speed over flash-decoding", f"{name}, {machine}", _published(1.73, "x", _LATER),
                      partial(_average, machine, over), None, f"depends on the baseline's release; {_GRID}"),
                Claim("largest speed over flash-decoding at 256k tokens", f"{name}, {machine}",
                      _published(2.18, "x", _LATER), partial(_largest, machine, over, 1 << 18), 0.25,
                      "two full waves against one and a bit, at most"),
            ]  # fmt: skip
    return tuple(found)
