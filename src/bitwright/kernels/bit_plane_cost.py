"""What products of one-bit planes cost on a CPU or GPU, beside int8, int4 and floating point, and which to take.

A CPU is described by rates measured on it (`measure_rates`); steps, tiles and bytes are those of
`bit_plane_matmul.tiling`, the description that runs. A GPU is described by its data sheet; a kernel's tiles fill its
multiprocessors in waves, and operands and results cross its memory once. The tile of the bit planes is chosen for every
shape and width among those whose operands fit the shared memory and whose sums fit half the registers; the peer is a
library kernel with one tile.

Source: arXiv 2409.17870, arXiv 2508.19087 (kernel mapping).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.kernels.bit_plane_matmul import TILE, Tiling, matmul, pack, quantise, tiling, usable_path
from bitwright.kernels.work import Cost


@dataclass(frozen=True)
class CpuRates:
    """Rates of one core, measured: 512-position steps per second of tiles with 4 columns and with 2, seconds per tile
    beyond its steps, rounded and packed values per second, int8 and float32 multiply-accumulates per second (torch),
    bytes per second that all cores read from memory together, seconds to start a thread."""

    path: str
    steps_per_s: float
    narrow_steps_per_s: float
    tile_s: float
    values_per_s: float
    int8_macs_per_s: float
    float32_macs_per_s: float
    bytes_per_s: float
    thread_start_s: float

    @property
    def one_bit_macs_per_s(self) -> float:
        """One-bit multiply-accumulates per second of full tiles over long k."""
        return 512 * self.steps_per_s


def bit_plane_cost(plan: Tiling, rates: CpuRates, threads: int = 1) -> Cost:
    """Time of a described product on so many cores. A doubling is one of the three instructions of a step."""
    per_step = rates.steps_per_s if plan.columns >= TILE else rates.narrow_steps_per_s
    compute = (plan.steps + plan.doublings / 3) / per_step + plan.tiles * rates.tile_s
    return Cost(compute / threads, plan.bytes_moved / rates.bytes_per_s, (threads - 1) * rates.thread_start_s)


def dense_cost(plan: Tiling, rates: CpuRates, kind: str, threads: int = 1) -> Cost:
    """Time of the same product as "int8" or "float32", operands in that type. Raises UnknownNameError for others."""
    known = {"int8": (1, rates.int8_macs_per_s), "float32": (4, rates.float32_macs_per_s)}
    if kind not in known:
        raise UnknownNameError("kind of product", kind, known)
    size, macs_per_s = known[kind]
    moved = size * (plan.m + plan.n) * plan.k + plan.bytes_written
    return Cost(plan.m * plan.n * plan.k / macs_per_s / threads, moved / rates.bytes_per_s)


def crossover_pairs(n: int, k: int, rates: CpuRates, m: int = 4096) -> float:
    """Pairs of planes p * q at which one-bit products over (m, k) and n columns take as long as int8 ones: between the
    numbers of pairs 1 x q on either side, linearly. Infinite when eight pairs are still faster."""
    int8 = dense_cost(tiling(m, n, k, 1, 1), rates, "int8").time_s
    times = [bit_plane_cost(tiling(m, n, k, 1, q), rates).time_s for q in range(1, 9)]
    return crossing(list(range(1, 9)), times, int8)


def crossing(pairs: list[int], times: list[float], level: float) -> float:
    """Where times, growing with pairs, reach a level: linear in between, from 0 below the first."""
    if times[0] >= level:
        return pairs[0] * level / times[0]
    for (low, below), (high, above) in pairwise(zip(pairs, times, strict=True)):
        if above >= level:
            return low + (high - low) * (level - below) / (above - below)
    return float("inf")


@dataclass(frozen=True)
class KernelChoice:
    """A kernel for a product: "bit planes", "int8" or "float32" on a CPU, with threads; on a GPU "binary", "int4",
    "int8" or "fp16" with its tile. `alternatives` are the predicted seconds of every candidate."""

    kernel: str
    setting: str
    cost: Cost
    alternatives: dict[str, float]


def select_kernel(
    m: int, n: int, k: int, w_bits: int, a_bits: int, machine: CpuRates | str, threads: int = 1
) -> KernelChoice:
    """The predicted fastest exact kernel for W (m, k) x A (n, k) on a measured CPU or a GPU of `GPUS`.

    int8 holds the codes as signed integers (v = (v' - 1) / 2), float32 is exact while every sum fits 24 bits. Raises
    InputError for sizes and widths outside their ranges, UnknownNameError for other GPUs.
    """
    plan = tiling(m, n, k, w_bits, a_bits)
    found: dict[tuple[str, str], Cost] = {}
    if isinstance(machine, CpuRates):
        for used in range(1, threads + 1):
            found["bit planes", f"{used} threads"] = bit_plane_cost(plan, machine, used)
        found["int8", f"{threads} threads"] = dense_cost(plan, machine, "int8", threads)
        if k * ((1 << w_bits) - 1) * ((1 << a_bits) - 1) < 1 << 24:
            found["float32", f"{threads} threads"] = dense_cost(plan, machine, "float32", threads)
    else:
        device = gpu(machine)
        tile, cost = best_tile(device, plan)
        found["binary", f"tile {tile[0]} x {tile[1]} x {tile[2]}"] = cost
        for kind in ("int4", "int8", "fp16"):
            bits = {"int4": 4, "int8": 8, "fp16": 16}[kind]
            if max(w_bits, a_bits) <= bits and device.rates.get(kind):
                found[kind, f"tile {PEER_TILE[0]} x {PEER_TILE[1]}"] = gpu_peer_cost(device, plan, kind)
    (kernel, setting), cost = min(found.items(), key=lambda item: item[1].time_s)
    return KernelChoice(kernel, setting, cost, {f"{a}, {b}": each.time_s for (a, b), each in found.items()})


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors, bytes of shared memory of one, bytes/s of its memory, dense operations/s by operand type
    (two per multiply-accumulate; fp16 with float32 sums), and where the figures are from."""

    name: str
    multiprocessors: int
    shared_bytes: int
    bytes_per_s: float
    rates: dict[str, float]
    source: str


_EIGHT = "binary: eight times int8, the ratio of positions per instruction (k = 256 to 32)"
GPUS = (
    Gpu("RTX 3090", 82, 100 << 10, 936.2e9, {"fp16": 71.2e12, "int8": 284.7e12, "int4": 568.5e12, "binary": 2276e12},
        "NVIDIA Ampere GA102 whitepaper (2020), dense; binary: eight times int8 (m16n8k256 to m16n8k32)"),
    Gpu("RTX 4090", 128, 100 << 10, 1008e9, {"fp16": 165.2e12, "int8": 660.6e12, "int4": 1321.2e12, "binary": 5285e12},
        f"NVIDIA Ada whitepaper v2 (2023), dense; {_EIGHT}"),
    Gpu("H800", 132, 227 << 10, 3350e9, {"fp16": 989.4e12, "int8": 1978.9e12, "binary": 15831e12},
        f"as H100 SXM, NVIDIA Hopper whitepaper (2022), dense, no int4; {_EIGHT}"),
)  # fmt: skip
PEER_TILE = (128, 128)  # CUTLASS's default threadblock
_ACCUMULATOR_BYTES = 128 << 10  # half the registers of a multiprocessor
_STAGES = 2  # double buffering


def gpu(name: str) -> Gpu:
    """A GPU of `GPUS`. Raises UnknownNameError for others."""
    for each in GPUS:
        if each.name == name:
            return each
    raise UnknownNameError("GPU", name, [each.name for each in GPUS])


def _waves_s(device: Gpu, plan: Tiling, tile: tuple[int, int], operations_per_s: float) -> float:
    """Time of the products of (m, n) in tiles, each on one multiprocessor, k padded to 128."""
    count = -(-plan.m // tile[0]) * -(-plan.n // tile[1])
    waves = -(-count // device.multiprocessors)
    depth = -(-plan.k // 128) * 128
    return waves * 2.0 * tile[0] * tile[1] * depth / (operations_per_s / device.multiprocessors)


def best_tile(device: Gpu, plan: Tiling) -> tuple[tuple[int, int, int], Cost]:
    """Tile (rows, columns, positions at once) of the bit planes that is predicted fastest, and its cost."""
    memory = (plan.k * (plan.m * plan.w_bits + plan.n * plan.a_bits) / 8 + plan.bytes_written) / device.bytes_per_s
    found = {}
    for rows in (16, 32, 64, 128, 256):
        for columns in (8, 16, 32, 64, 128, 256):
            for depth in (512, 256, 128):
                operands = _STAGES * (rows * plan.w_bits + columns * plan.a_bits) * depth // 8
                if operands <= device.shared_bytes and 4 * rows * columns <= _ACCUMULATOR_BYTES:
                    time = _waves_s(device, plan, (rows, columns), device.rates["binary"] / plan.pairs)
                    found[rows, columns, depth] = Cost(time, memory)
                    break
    # among equals the largest tile, which reads operands from the second-level cache least often
    tile = min(found, key=lambda each: (found[each].time_s, -each[0] * each[1]))
    return tile, found[tile]


def gpu_peer_cost(device: Gpu, plan: Tiling, kind: str, efficiency: float = 1.0) -> Cost:
    """Time of a library product of "int4", "int8" or "fp16" operands in one fixed tile, at `efficiency` of the peak.

    Raises InputError for a type the GPU has no rate for.
    """
    if kind not in device.rates or kind == "binary":
        raise InputError(f"{device.name} has dense rates for {', '.join(device.rates)}, not for {kind!r}.")
    bits = {"int4": 4, "int8": 8, "fp16": 16}[kind]
    memory = (plan.k * (plan.m + plan.n) * bits / 8 + plan.bytes_written) / device.bytes_per_s
    return Cost(_waves_s(device, plan, PEER_TILE, device.rates[kind] * efficiency), memory)


def gpu_speed_up(name: str, m: int, n: int, k: int, w_bits: int, a_bits: int, peer: str = "int4") -> float:
    """Predicted time of a library product over that of one-bit planes. Raises as `gpu` and `gpu_peer_cost`."""
    device, plan = gpu(name), tiling(m, n, k, w_bits, a_bits)
    return gpu_peer_cost(device, plan, peer).time_s / best_tile(device, plan)[1].time_s


def _least_s(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def measure_rates(repeats: int = 9) -> CpuRates:
    """Rates of this CPU: the least of `repeats` times each, one thread (about three seconds). Operands of the one-bit
    and int8 products stay in the cache; the reading rate is that of a sum over 256 MB by all of torch's threads."""
    import torch

    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()

    def product_s(m: int, n: int, k: int, used: int = 1, a_bits: int = 1) -> tuple[Tiling, float]:
        w = pack(rng.integers(0, 2, (m, k)).astype(np.uint8), 1)
        a = pack(rng.integers(0, 1 << a_bits, (n, k)).astype(np.uint8), a_bits)
        out = np.empty((m, n), np.int32)
        return tiling(m, n, k, 1, a_bits), _least_s(lambda: matmul(w, a, used, out=out), repeats)

    (short, short_s), (long, long_s) = product_s(256, 256, 1024), product_s(256, 256, 8192)
    step_s = (long_s - short_s) / (long.steps - short.steps)
    narrow, narrow_s = product_s(256, 2, 8192, a_bits=8)
    tile_s = max(0.0, (short_s - short.steps * step_s) / short.tiles)
    rows = rng.normal(size=(64, 4096)).astype(np.float32)
    start_s = max(0.0, product_s(1024, 64, 4096, 2)[1] - product_s(1024, 64, 4096)[1] / 2)
    torch.set_num_threads(1)
    try:
        a8, b8 = (torch.randint(-127, 128, (512, 4096), dtype=torch.int8) for _ in range(2))
        int8_s = _least_s(lambda: torch._int_mm(a8, b8.t()), repeats)
        a32, b32 = a8.float(), b8.float()
        float_s = _least_s(lambda: a32 @ b32.t(), repeats)
    finally:
        torch.set_num_threads(threads)
    big = torch.ones(64 << 20)
    read_s = _least_s(big.sum, 5)
    macs = 512 * 512 * 4096
    return CpuRates(
        usable_path(), 1 / step_s, narrow.steps / narrow_s, tile_s,
        rows.size / _least_s(lambda: quantise(rows, 4, threads=1), repeats), macs / int8_s, macs / float_s,
        big.nbytes / read_s, start_s,
    )  # fmt: skip
