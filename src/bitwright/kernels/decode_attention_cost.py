"""Time of decode attention on a GPU from the partition that the native kernel executes. Evidence: simulated.

Every worker holds one of two slots of a compute unit and reads its tiles with an equal share of the main memory's
bandwidth; decoding does a few operations per byte, so nothing else counts. A peer writes its partial result; the host
of a block reads the partial results of all and merges them: in `lean` when the last of its peers is done, in
flash-decoding in a second kernel after all workers. Tiles, slots and numbers of workers and splits are those of the
releases.

Source: arXiv 2405.10480 and its release; flash-attention's split heuristic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import Device
from bitwright.core.timeline import Schedule, Timeline
from bitwright.kernels.attention_partition import (
    Partition,
    causal_tiles,
    efficient_splits,
    fixed_split,
    lean,
    lean_padded,
    lean_workers,
    tiles_of,
    whole,
)
from bitwright.kernels.work import Work

# "lean-padded": shares of the longest sequence for all, as released. "fixed-early": flash-decoding as in early
# releases, which count one slot per compute unit instead of two.
GPU_SCHEDULES = ("lean", "lean-padded", "fixed", "fixed-early", "whole")
SLOTS_PER_UNIT = 2
FENCE_S = 1e-6  # assumption: a flag written by one unit and seen by another, one trip to the L2 cache and back


@dataclass(frozen=True)
class DecodeShape:
    """One step of decoding: keys of every sequence, query heads, key-value heads, channels, bytes per number.

    Raises InputError for heads that key-value heads do not divide and for sizes below one.
    """

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    channels: int
    itemsize: int = 2

    def __post_init__(self) -> None:
        sizes = (self.heads, self.kv_heads, self.channels, self.itemsize, len(self.lengths))
        if min(sizes) < 1 or min(self.lengths) < 0 or self.heads % self.kv_heads:
            raise InputError(f"{self} is no step of decoding: heads are whole groups per key-value head, sizes >= 1.")

    @property
    def rows(self) -> int:
        """Query heads that share a key-value head: the rows of a block."""
        return self.heads // self.kv_heads

    @property
    def cache_bytes(self) -> float:
        """Bytes of keys and values that the step reads."""
        return 2.0 * sum(self.lengths) * self.kv_heads * self.channels * self.itemsize


def gpu_tile(channels: int) -> int:
    """Keys per tile in the release for A100: 256 for 64 channels or fewer, 128 for 128, else 64."""
    return 256 if channels <= 64 else 128 if channels <= 128 else 64


def gpu_partition(schedule: str, tiles: Sequence[int] | np.ndarray, units: int) -> Partition:
    """The partition that a release makes of blocks of `tiles` on `units` compute units.

    Raises UnknownNameError for a schedule that is not in GPU_SCHEDULES.
    """
    if schedule not in GPU_SCHEDULES:
        raise UnknownNameError("schedule", schedule, GPU_SCHEDULES)
    counts = np.asarray(tiles, np.int64)
    blocks, longest = int((counts > 0).sum()), int(counts.max(initial=0))
    if schedule == "whole":
        return whole(counts)
    if schedule == "lean":
        return lean(counts, lean_workers(int(counts.sum()), longest, max(blocks, 1), units))
    if schedule == "lean-padded":
        return lean_padded(counts, lean_workers(longest * len(counts), longest, len(counts), units))
    slots = units * (SLOTS_PER_UNIT if schedule == "fixed" else 1)
    return fixed_split(counts, efficient_splits(max(blocks, 1), longest, slots))


@dataclass(frozen=True)
class Simulation:
    """A partition in time: when every worker and merge ran; share of the slots that was busy; share of the time after
    the last worker; bytes of partial results and flags."""

    schedule: Schedule
    time_s: float
    occupancy: float
    merge_share: float
    workspace_bytes: int


def simulate(
    partition: Partition, slots: int, tile_s: float, result_s: float, launch_s: float = 0.0,
    separate_merge: bool = False, result_bytes: int = 0,
) -> Simulation:  # fmt: skip
    """Run a partition on `slots`: a worker takes `tile_s` per tile and `result_s` to write each partial result, a merge
    `result_s` per piece and a fence; `separate_merge` starts all merges with a launch after all workers.

    Raises InputError where workers that wait for others exceed the slots (they would wait forever).
    """
    split = partition.splits > 1
    if not separate_merge and split.any() and partition.workers > slots:
        raise InputError(f"{partition.workers} workers wait for each other on {slots} slots; take as many workers.")
    pieces = partition.pieces
    partial = np.bincount(pieces.worker[split[pieces.block]], minlength=partition.workers)
    work = partition.loads * tile_s + partial * result_s
    blocks = np.flatnonzero(split)
    merges = partition.splits[blocks] * result_s + FENCE_S
    timeline = Timeline()
    unit = timeline.resource("slots", slots)
    workers = len(work)
    durations = np.concatenate([work, [launch_s if separate_merge and len(blocks) else 0.0], merges])
    merge_task = np.full(len(split), -1)
    merge_task[blocks] = workers + 1 + np.arange(len(blocks))
    waits = pieces.worker[split[pieces.block]], merge_task[pieces.block[split[pieces.block]]]
    if separate_merge:
        waits = (
            np.concatenate([np.arange(workers), np.full(len(blocks), workers)]),
            np.concatenate([np.full(workers, workers), merge_task[blocks]]),
        )
    timeline.tasks(durations, np.full(len(durations), unit), after=waits)
    made = timeline.simulate()
    computed = float(made.finish[:workers].max())
    total = made.makespan + launch_s
    busy = float((work.sum() + merges.sum()) / (slots * total)) if total else 0.0
    space = int(partition.splits[blocks].sum()) * result_bytes + 4 * int(partition.tiles.size) if len(blocks) else 0
    return Simulation(made, total, busy, (made.makespan - computed) / total if total else 0.0, space)


def _device(device: Device) -> tuple[int, float, float, float]:
    """Compute units, bytes per second of the main memory and, for partial results, of the L2 cache where the machine
    file states it (else of the main memory), seconds per launch."""
    bandwidth = device.main_memory.sustained or device.main_memory.bandwidth
    if device.cores is None or bandwidth is None:
        raise InputError(f"{device.title or 'The device'} states no number of cores or no memory bandwidth.")
    launch = device.launch_overhead.value if device.launch_overhead else 0.0
    cache = device.memories.get("l2")
    near = cache.bandwidth if cache is not None and cache.bandwidth is not None else bandwidth
    return int(device.cores.value), bandwidth.value, near.value, launch


def simulate_decode(device: Device, shape: DecodeShape, schedule: str = "lean") -> Simulation:
    """One step of decoding on a device of a machine file. Raises InputError for a device without the figures."""
    units, bandwidth, near, launch = _device(device)
    tile, slots = gpu_tile(shape.channels), units * SLOTS_PER_UNIT
    partition = gpu_partition(schedule, tiles_of(shape.lengths, shape.kv_heads, tile), units)
    tile_s = 2 * tile * shape.channels * shape.itemsize * slots / bandwidth
    result = 4 * shape.rows * (shape.channels + 1)
    separate = schedule in ("fixed", "fixed-early")
    return simulate(partition, slots, tile_s, result * slots / near, launch, separate, result)


def simulate_causal_prefill(
    device: Device, tokens: int, heads: int, channels: int, schedule: str = "lean", batch: int = 1
) -> Simulation:
    """Causal attention over a whole prompt: blocks of 128 queries by tiles of 64 keys, at the fp16 matrix peak."""
    units, _, near, launch = _device(device)
    rows, keys, slots = 128, 64, units * SLOTS_PER_UNIT
    per_row = [causal_tiles(min((i + 1) * rows, tokens), rows, keys) - causal_tiles(i * rows, rows, keys)
               for i in range(ceil(tokens / rows))]  # fmt: skip
    # Long blocks first, as the releases order them.
    tiles = np.tile(np.array(per_row[::-1], np.int64), batch * heads)
    peak = device.compute.matrix.get("fp16")
    if peak is None:
        raise InputError(f"{device.title or 'The device'} states no fp16 matrix rate.")
    tile_s = 4 * rows * keys * channels * slots / peak.value
    result = 4 * rows * (channels + 1)
    separate = schedule in ("fixed", "fixed-early")
    made = gpu_partition(schedule, tiles, units)
    return simulate(made, slots, tile_s, result * slots / near, launch, separate, result)


def speed_up(device: Device, shape: DecodeShape, over: str, schedule: str = "lean") -> float:
    """Time of another schedule over that of `schedule`, simulated."""
    return simulate_decode(device, shape, over).time_s / simulate_decode(device, shape, schedule).time_s


def crossover(device: Device, heads: int, channels: int, batch: int = 1, longest: int = 1 << 20) -> int | None:
    """Tokens from which on lean is faster than flash-decoding in every doubling up to `longest`; None if never."""
    found = None
    tokens = 128
    while tokens <= longest:
        faster = speed_up(device, DecodeShape((tokens,) * batch, heads, heads, channels), "fixed") > 1
        found = (found or tokens) if faster else None
        tokens *= 2
    return found


def decode_work(shape: DecodeShape, pieces: int, value_channels: int | None = None) -> Work:
    """What one step does on any processor: products with keys and values and one exponential per score, in fp32; every
    cached byte read once. `pieces` are the workers of equal load (or blocks, where each is one worker's).

    An exponential counts as the 11 multiply-adds of its polynomial and scaling.
    """
    values = shape.channels if value_channels is None else value_channels
    scores = float(sum(shape.lengths)) * shape.heads
    traffic = float(sum(shape.lengths)) * shape.kv_heads * (shape.channels + values) * shape.itemsize
    return Work({"fp32": scores * (2 * (shape.channels + values) + 22)}, {"memory": traffic}, pieces=pieces)
