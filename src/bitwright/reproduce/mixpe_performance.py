"""Arrays of mixed-precision elements beside ordinary ones on networks: assumption sets for the claims of MixPE.

The paper's baselines, areas and clock are not in its abstract. Every set below names its own: elements synthesised to
the predictive 28 nm library at 500 MHz, arrays of 32 rows, the peer 32 columns wide, the other array as wide as the
same area allows (dequantisers, row sums and the registers of totals charged; what an ordinary array does with scales
after the sum is not), weights in groups of 128 with zero points, buffers and memory of `olive_performance` (384 KiB,
1,024 bits per cycle), linear layers of all blocks. Figures are geometric means over networks. All are predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from bitwright.core.errors import InputError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.core.workload import Gemm
from bitwright.engine.late_dequantising_array import (
    ArrayFigures,
    BufferAndMemory,
    Comparison,
    compare,
    equal_area,
    network_cost,
)
from bitwright.engine.late_dequantising_parts import array_figures
from bitwright.engine.libraries import find_library
from bitwright.models.configurations import configuration
from bitwright.reproduce import olive_performance as memory_system

NETWORKS = ("llama-2-7b", "llama-2-13b", "opt-6.7b")
LIBRARY, CLOCK_HZ, ROWS, COLUMNS, GROUP = "predictive-28nm", 500e6, 32, 32, 128
TOKENS = {"prefill of 2048": 2048, "decode, batch 1": 1, "decode, batch 8": 8, "decode, batch 64": 64}
PAIRS = (("MixPE-A8", "INT8"), ("MixPE-A8", "INT8-W4"), ("MixPE-A8", "FP16"), ("MixPE-A8", "FP16-W4"),
         ("MixPE-A16", "FP16"), ("MixPE-A16", "FP16-W4"))  # fmt: skip
NAMES = {"INT8": "INT8 (W8A8)", "INT8-W4": "INT8 elements on W4, scales as in MixPE", "FP16": "FP16 (W16A16)",
         "FP16-W4": "FP16 with W4 expanded before the array"}  # fmt: skip
Figure = Literal["speed", "compute", "memory", "energy"]


@dataclass(frozen=True)
class Assumptions:
    """Which array beside which peer, on what; `accumulator_bits` of int8 elements, None: as many as the sums need (19
    for a group of 128; 28 for the INT8 peer, whose sums run over up to 16,384 products)."""

    array: str
    peer: str
    workload: str
    accumulator_bits: int | None = 32
    rows: int = ROWS

    @property
    def text(self) -> str:
        """The set in words."""
        sums = "" if "A16" in self.array or self.accumulator_bits else ", sums as wide as needed"
        rows = "" if self.rows == ROWS else f", {self.rows} rows"
        return f"{self.array} over {NAMES[self.peer]}, {self.workload}, equal area, 28 nm, 500 MHz{sums}{rows}"


def linear_layers(network: str, tokens: int) -> list[Gemm]:
    """Query, key, value, output, gate (where there is one), up and down projections of all blocks."""
    c = configuration(network)
    key = c.kv_heads * c.head_dim
    shapes = [(c.hidden, c.hidden)] * 2 + [(key, c.hidden)] * 2
    shapes += [(c.feed_forward, c.hidden)] * (2 if c.gated else 1) + [(c.hidden, c.feed_forward)]
    return [Gemm(batch=c.layers, m=tokens, n=n, k=k) for n, k in shapes]


def memories() -> BufferAndMemory:
    """Buffers and memory of the released ANT simulator."""
    return BufferAndMemory(
        memory_system.OPERAND_BUFFER_BYTES, memory_system.DRAM_BITS_PER_CYCLE * memory_system.CLOCK_HZ,
        memory_system.BUFFER_READ_J_PER_BIT, memory_system.DRAM_READ_J_PER_BIT, memory_system.DRAM_WRITE_J_PER_BIT,
        memory_system.DRAM_IDLE_W,
    )  # fmt: skip


@cache
def figures(name: str, rows: int, accumulator_bits: int | None) -> ArrayFigures:
    """An array of gates; see `late_dequantising_parts.array_figures`."""
    if accumulator_bits is None and name == "INT8":
        accumulator_bits = 28
    return array_figures(name, find_library(LIBRARY), CLOCK_HZ, rows, COLUMNS, GROUP, accumulator_bits)


def comparison(assumptions: Assumptions, network: str) -> Comparison:
    """One network under one set."""
    if assumptions.workload not in TOKENS:
        raise InputError(f"Workloads are {', '.join(TOKENS)}, not {assumptions.workload!r}.")
    peer = figures(assumptions.peer, assumptions.rows, assumptions.accumulator_bits)
    array = figures(assumptions.array, assumptions.rows, assumptions.accumulator_bits)
    gemms = linear_layers(network, TOKENS[assumptions.workload])
    costs = [network_cost(gemms, each, memories()) for each in (equal_area(array, peer.area_um2), peer)]
    return compare(*costs)


def mean(assumptions: Assumptions, figure: Figure) -> float:
    """Geometric mean over the networks."""
    found = [getattr(comparison(assumptions, network), figure) for network in NETWORKS]
    return float(np.exp(np.log(found).mean()))


def sets() -> tuple[Assumptions, ...]:
    """All sets that are shown."""
    plain = [Assumptions(*pair, workload) for pair in PAIRS for workload in TOKENS]
    first = next(iter(TOKENS))
    wide = [Assumptions("MixPE-A8", peer, first, bits, rows) for peer in ("INT8", "FP16")
            for bits, rows in ((None, ROWS), (None, 2 * ROWS))]  # fmt: skip
    return (*plain, *wide)


def measured(assumptions: Assumptions, figure: Figure) -> Callable[[], Quantity]:
    """The mean as a quantity, with the terms of the time in its source."""

    def measure() -> Quantity:
        terms = {name: mean(assumptions, name) for name in ("speed", "compute", "memory", "energy")}
        source = f"alone: compute {terms['compute']:.2f}x, memory {terms['memory']:.2f}x"
        return Quantity(terms[figure], "x", Evidence.PREDICTED, source)

    return measure
