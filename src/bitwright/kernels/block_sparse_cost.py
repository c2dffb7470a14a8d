"""Cycles of block-sparse int8 products, counted from the instructions of one group of the inner loop.

A group is 4 inputs of one block row (4 outputs) by one tile of columns. What it needs of each resource of a core comes
from its instructions; the busiest resource sets its cycles. Two versions are counted: the published kernel, generated
as straight-line code with the inputs' places as constants, and ours, a loop that reads them. Straight-line code runs
once per tile of columns: with one tile (64 tokens) nothing is fetched twice and the decoders' bytes are the limit,
not the dot products. Evidence: predicted. Sources: arXiv 2306.16601 and its released kernel (instructions); instruction
lengths from the Intel 64 manual, volume 2 (EVEX: 6 bytes, and 4 of displacement where memory is addressed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from bitwright.core.errors import InputError

Kernel = Literal["published", "loop"]


@dataclass(frozen=True)
class Core:
    """One core: clock in Hz, instructions per cycle by kind ("dot", "shuffle", "blend" of 512 bits, "load"; `shared`
    lists groups of kinds that use the same ports, with the instructions of the group per cycle), bytes of instructions
    decoded per cycle when they come from beyond the cache of decoded ones, its capacity in instructions, the L1 data
    cache, bytes per cycle from the L2 cache for scattered lines, and cycles lost where a loop ends."""

    clock_hz: float
    per_cycle: Mapping[str, float]
    shared: tuple[tuple[tuple[str, ...], float], ...]
    decoded_bytes: float
    decoded_capacity: int
    l1_bytes: int
    l2_bytes_per_cycle: float
    mispredicted: float = 17


# Xeon Platinum 8375C (AWS c6i): Ice Lake server, 3.5 GHz turbo of all cores (AWS instance page); two 512-bit ports (0
# and 5), shuffles on port 5 only, 2 loads per cycle, 16 bytes of instructions decoded per cycle, 2,304 decoded ones
# kept, 48 KiB L1, 48 bytes per cycle sustained from L2 (Intel optimisation manual, 248966, chapter 2; Fog, "The
# microarchitecture of Intel, AMD and VIA CPUs").
ICE_LAKE = Core(
    3.5e9, {"dot": 2, "shuffle": 1, "blend": 2, "load": 2}, ((("dot", "shuffle", "blend"), 2),), 16, 2304, 48 << 10, 48
)
# EPYC with Zen 5: 512-bit units; dots on 2 pipes, shuffles on 2, of 4 in all, one of them common; 2 loads of 512 bits;
# 2 x 32 bytes decoded, 6,144 decoded ones kept (AMD 58455, Software Optimization Guide for Zen 5). Clock and scattered
# lines from L2 as measured: 4 lines per 13 cycles in the inner loop with activations beyond L1.
ZEN_5 = Core(
    4.0e9, {"dot": 2, "shuffle": 2, "blend": 4, "load": 2}, ((("dot", "shuffle"), 3), (("dot", "shuffle", "blend"), 4)),
    64, 6144, 48 << 10, 20,
)  # fmt: skip


def tile_widths(columns: int, kernel: Kernel = "loop") -> list[int]:
    """Columns of the tiles that a row of blocks is cut into: 64 and what is left (loop: tiles of up to 96)."""
    if columns < 1:
        raise InputError(f"{columns} columns asked for; expected at least one.")
    widest, widths = (96 if kernel == "loop" else 64), []
    while columns:
        widths.append(columns if columns <= widest else 64)
        columns -= widths[-1]
    return widths


def group_instructions(columns: int, kernel: Kernel) -> dict[str, float]:
    """Instructions of one group by kind, and "bytes" of code, for a tile of so many columns."""
    vectors = ceil(columns / 16)
    dots, broadcasts = 4 * vectors, 4
    if kernel == "published":  # per vector of 16 columns: 4 loads of 16 bytes (2 of them merged), 1 permute, 1 shuffle
        loads, merges, shuffles = 4 * vectors, 2 * vectors, 2 * vectors
        code = 10 * (loads + broadcasts) + 6 * (shuffles + dots)
        return {"dot": dots, "shuffle": shuffles, "blend": merges, "load": loads + broadcasts, "bytes": code}
    wide, narrow = (1, max(0, vectors - 4)) if columns > 48 else (0, vectors)
    # 64 columns: 4 loads, 8 unpackings; 16 columns: 4 loads, 3 inserts and 2 shuffles
    loads, shuffles = 4 * (wide + narrow), 8 * wide + 5 * narrow
    code = 8 * (loads + broadcasts) + 6 * (shuffles + dots) + 40
    return {"dot": dots, "shuffle": shuffles, "blend": 0, "load": loads + broadcasts + 2, "bytes": code}


def group_cycles(
    columns: int, inputs: int, groups: float, core: Core, kernel: Kernel = "loop", repeats: int = 1
) -> dict[str, float]:
    """Cycles that one group keeps each resource of a core busy: "ports", "load", "decode", "L2".

    `inputs` by `columns` bytes of activations lie in L1 or, when they are more, in L2 (every row is then fetched anew);
    `groups` of a block row make up the straight-line code, run `repeats` times (tiles of the same width)."""
    counts = group_instructions(columns, kernel)
    kinds = ("dot", "shuffle", "blend")
    busy = [counts[kind] / core.per_cycle[kind] for kind in kinds]
    busy += [sum(counts[kind] for kind in group) / rate for group, rate in core.shared]
    straight = kernel == "published"
    size = sum(counts[kind] for kind in (*kinds, "load")) * (groups if straight else 1)
    fresh = 0.0 if size <= core.decoded_capacity and (repeats > 1 or not straight) else 1.0
    fetched = 4 * 16 * ceil(columns / 16) if inputs * columns > core.l1_bytes else 0
    return {
        "ports": max(busy), "load": counts["load"] / core.per_cycle["load"],
        "decode": fresh * counts["bytes"] / core.decoded_bytes, "L2": fetched / core.l2_bytes_per_cycle,
    }  # fmt: skip


@dataclass(frozen=True)
class VnniCost:
    """Time of one product on one core, what limits a group of its first tile, and useful operations per second (those
    of the dense product)."""

    time_s: float
    bound: str
    dense_operations_per_s: float


def vnni_cost(
    outputs: int, inputs: int, columns: int, sparsity: float, core: Core, kernel: Kernel = "loop", threads: int = 1
) -> VnniCost:
    """Predicted time of W (outputs, inputs) with this share of (4, 1) blocks dropped by (inputs, columns), block rows
    shared by `threads` cores. Where a tile of the loop ends its sums are put in order (2 shuffles each) and stored.
    Raises InputError for sizes below one and shares outside of 0 to 1."""
    if min(outputs, inputs, columns, threads) < 1 or not 0 <= sparsity <= 1:
        raise InputError(f"{outputs} x {inputs} by {columns} at {sparsity} asked for; expected sizes and a share.")
    block_rows = ceil(ceil(outputs / 4) / threads)
    groups = ceil(inputs * (1 - sparsity) / 4)
    widths = tile_widths(columns, kernel)
    cycles, bound = 0.0, ""
    for width in widths:
        busy = group_cycles(width, inputs, groups, core, kernel, widths.count(width))
        end = group_instructions(width, kernel)["dot"] * (1 + 2 / core.per_cycle["shuffle"]) + core.mispredicted
        cycles += block_rows * (groups * max(busy.values()) + (end if groups and kernel == "loop" else 0.0))
        bound = bound or max(busy, key=lambda name: busy[name])
    time_s = cycles / core.clock_hz
    return VnniCost(time_s, bound, 2.0 * outputs * inputs * columns / time_s if time_s else float("inf"))
