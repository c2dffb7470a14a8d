"""Time and energy of linear layers on the machines that OliVe is compared on. Everything here is predicted.

GPU: every matrix product takes the longer of computing and moving its operands once; the board draws its rated power
while it does, whatever the format, and memory its energy per bit. Figures of the RTX 2080 Ti: NVIDIA Turing GPU
architecture whitepaper (2018), reference clocks, dense; GDDR6 energy as in machines/memories.yaml.

Accelerators: arrays of the published sizes, which the authors chose to have equal areas, in the published memory system
(released ANT simulator: 500 MHz, 1,024 bits of DRAM per cycle, 128 + 256 KiB of buffers for operands; its CACTI
figures at 28 nm for buffers, its DRAM energies). Output stationary: a tile takes k + rows cycles. Elements take the
energy of their gates under the predictive 28 nm library, at vectorless power, every cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from bitwright.arithmetic import formats
from bitwright.core.errors import UnknownNameError
from bitwright.core.workload import Gemm
from bitwright.engine.libraries import find_library
from bitwright.engine.operand_traffic import panel_traffic
from bitwright.engine.power import vectorless_power
from bitwright.engine.standalone_units import Unit, integer_multiplier, product, unit_gates

# hidden size, layers, inner size of the feed-forward
NETWORKS = {
    "BERT-base": (768, 12, 3072), "BERT-large": (1024, 24, 4096), "GPT2-XL": (1600, 48, 6400),
    "BLOOM-7B1": (4096, 30, 16384), "OPT-6.7B": (4096, 32, 16384),
}  # fmt: skip
TOKENS = 2048
# operations per second of the tensor cores (FP16: with FP16 sums), bytes per second, watts, joules per bit
GPU_OPERATIONS = {"int4": 430.3e12, "int8": 215.2e12, "fp16": 107.6e12}
GPU_BANDWIDTH, GPU_POWER_W, GPU_MEMORY_J_PER_BIT = 616e9, 250.0, 6.5e-12
GPU_DIE_MM2, GPU_DECODERS_4BIT, GPU_DECODERS_8BIT = 754.0, 139264, 69632
DECODER_4BIT_UM2, DECODER_8BIT_UM2 = 13.53, 18.00  # published, 22 nm
CLOCK_HZ, DRAM_BITS_PER_CYCLE, OPERAND_BUFFER_BYTES = 500e6, 1024, 384 * 1024
DRAM_READ_J_PER_BIT, DRAM_WRITE_J_PER_BIT, DRAM_IDLE_W = 0.644304e-9 / 1024, 0.784104e-9 / 1024, 0.484615
BUFFER_READ_J_PER_BIT = 0.0177688e-9 / 512


def linear_layers(network: str, tokens: int = TOKENS) -> list[Gemm]:
    """Query, key, value, output, up and down projections of all layers, for so many tokens. Raises UnknownNameError."""
    if network not in NETWORKS:
        raise UnknownNameError("network", network, NETWORKS)
    hidden, layers, inner = NETWORKS[network]
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]
    return [Gemm(batch=layers, m=tokens, n=n, k=k) for n, k in shapes]


def packed_bits(name: str, rows: int, k: int) -> float:
    """Bits per element of a (rows, k) operand, scales and padding included, by the size of the packed format."""
    return formats.parse(name).bits_per_element((rows, k))


def gobo_weight_bits(outlier_share: float) -> float:
    """GOBO (MICRO 2020): 3-bit indices into centroids; an outlier is stored in FP32 with a 16-bit position."""
    return 3 + outlier_share * (32 + 16)


@dataclass(frozen=True)
class GpuScheme:
    """How a GPU runs linear layers: the arithmetic it uses, and bits per weight and activation as (rows, k) -> bits."""

    arithmetic: str
    weight_bits: Callable[[int, int], float]
    activation_bits: Callable[[int, int], float]


def gpu_schemes(outlier_share: float) -> dict[str, GpuScheme]:
    """OliVe, plain int8, ANT (whose accuracy needs 8 bits on these networks) and GOBO (computes in FP16)."""

    def packed(name: str) -> Callable[[int, int], float]:
        return lambda rows, k: packed_bits(name, rows, k)

    return {
        "OliVe": GpuScheme("int4", packed("ovp4/row"), packed("ovp4/tensor")),
        "int8": GpuScheme("int8", packed("int8/row"), packed("int8/tensor")),
        "ANT": GpuScheme("int8", packed("int8/row"), packed("int8/tensor")),
        "GOBO": GpuScheme("fp16", lambda rows, k: gobo_weight_bits(outlier_share), lambda rows, k: 16.0),
    }  # fmt: skip


def gpu_cost(gemms: Sequence[Gemm], scheme: GpuScheme) -> tuple[float, float]:
    """Seconds and joules of the products on an RTX 2080 Ti; outputs are written like activations."""
    seconds = joules = 0.0
    for gemm in gemms:
        bits = gemm.n * gemm.k * scheme.weight_bits(gemm.n, gemm.k)
        bits += gemm.m * gemm.k * scheme.activation_bits(gemm.m, gemm.k)
        bits += gemm.m * gemm.n * scheme.activation_bits(gemm.m, gemm.n)
        operations = 2 * gemm.m * gemm.n * gemm.k
        time = max(operations / GPU_OPERATIONS[scheme.arithmetic], bits / 8 / GPU_BANDWIDTH)
        seconds += gemm.batch * time
        joules += gemm.batch * (time * GPU_POWER_W + bits * GPU_MEMORY_J_PER_BIT)
    return seconds, joules


@dataclass(frozen=True)
class Array:
    """An accelerator: elements that finish one multiply-accumulate per cycle, stored bits per operand, its element."""

    rows: int
    columns: int
    bits: float
    element: Callable[[], Unit]


# ANT runs 8-bit layers on its 64 x 64 elements of 4 bits, four per product; OLAccel: 16 x 18 of 8 bits, four times
# as many of 4 (its 16-bit outlier elements are left out); AdaptivFloat multiplies 8-bit floats.
ARRAYS = {
    "OliVe": Array(64, 64, 4, lambda: product("ovp4").accumulating()),
    "ANT": Array(32, 32, 8, lambda: integer_multiplier(8, 8).accumulating()),
    "OLAccel": Array(32, 36, 4, lambda: integer_multiplier(4, 4).accumulating()),
    "AdaptivFloat": Array(32, 28, 8, lambda: product("fp8_e4m3").accumulating(48)),
}  # fmt: skip


@cache
def element_energy_j(name: str) -> float:
    """One cycle of an element of `ARRAYS`: dynamic energy at the default activity, and its leakage."""
    library = find_library("predictive-28nm")
    netlist = unit_gates(ARRAYS[name].element(), library).netlist(library)
    return vectorless_power(netlist, 1 / CLOCK_HZ).power_w / CLOCK_HZ


def accelerator_cost(gemms: Sequence[Gemm], name: str) -> tuple[float, float]:
    """Seconds and joules of the products on an array of `ARRAYS`."""
    array, cycles, joules = ARRAYS[name], 0.0, 0.0
    each = element_energy_j(name) * array.rows * array.columns
    for gemm in gemms:
        tiles = -(-gemm.m // array.rows) * -(-gemm.n // array.columns)
        busy = gemm.batch * tiles * (gemm.k + array.rows)
        size = array.bits / 8
        read = 8 * sum(panel_traffic(gemm, array.rows, array.columns, size, size, OPERAND_BUFFER_BYTES))
        written = gemm.batch * gemm.m * gemm.n * array.bits
        buffered = gemm.batch * tiles * gemm.k * (array.rows + array.columns) * array.bits
        total = max(float(busy), (read + written) / DRAM_BITS_PER_CYCLE)
        cycles += total
        joules += busy * each + read * DRAM_READ_J_PER_BIT + written * DRAM_WRITE_J_PER_BIT
        joules += buffered * BUFFER_READ_J_PER_BIT + total / CLOCK_HZ * DRAM_IDLE_W
    return cycles / CLOCK_HZ, joules


def ratios(machine: str, peer: str, outlier_share: float) -> tuple[float, float]:
    """Speed and energy of `peer` over OliVe, geometric means over `NETWORKS`; `machine` is "gpu" or "accelerator"."""
    found = []
    for network in NETWORKS:
        gemms = linear_layers(network)
        if machine == "gpu":
            schemes = gpu_schemes(outlier_share)
            one, two = gpu_cost(gemms, schemes["OliVe"]), gpu_cost(gemms, schemes[peer])
        else:
            one, two = accelerator_cost(gemms, "OliVe"), accelerator_cost(gemms, peer)
        found.append([two[0] / one[0], two[1] / one[1]])
    speed, energy = np.exp(np.log(found).mean(axis=0)).tolist()
    return float(speed), float(energy)
