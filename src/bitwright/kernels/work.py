"""What a kernel does, counted from its tiling, and the time a processor needs for it. Evidence: predicted.

Operations of different kinds are done one after the other by each core, traffic at each memory level overlaps with them
and with that at the other levels (roofline; Williams et al., CACM 2009). Pieces of equal work go to the cores in waves,
as in NVIDIA's "Matrix Multiplication Background User's Guide":

    compute = ceil(pieces / cores) / pieces * sum over kinds of operations / rate of a core
    time    = launches * start + max(compute, bytes of each level / its bandwidth)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from bitwright.core.errors import InputError
from bitwright.core.machine import Device


@dataclass(frozen=True)
class Work:
    """Counts of one run: operations by kind, bytes by memory level, independent pieces of equal work, launches.

    A kind is a number format, computed by the matrix unit where its name begins with "matrix " ("matrix fp16"), or
    any other name that the rates know ("look-up int8"). A multiply-accumulate counts as two operations. Levels are
    names of a device's memories; "memory" is its main memory.
    """

    operations: Mapping[str, float]
    traffic: Mapping[str, float]
    pieces: int = 1
    launches: int = 1

    def __post_init__(self) -> None:
        counts = [*self.operations.values(), *self.traffic.values()]
        if any(not count >= 0 for count in counts) or self.pieces < 1 or self.launches < 0:
            raise InputError(f"Work is counted by numbers of at least 0, in at least one piece; given {self}.")


@dataclass(frozen=True)
class Rates:
    """Operations per second of one core by kind, bytes per second of all cores together by memory level (of each core
    for levels in `private`), cores, seconds to start a launch."""

    operations_per_s: Mapping[str, float]
    bytes_per_s: Mapping[str, float]
    cores: int = 1
    start_s: float = 0.0
    private: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Cost:
    """Seconds for arithmetic, for the slowest memory level and to start; `level` names that memory level."""

    compute_s: float
    memory_s: float
    start_s: float = 0.0
    level: str = "memory"

    @property
    def time_s(self) -> float:
        """The larger of arithmetic and traffic, and the start."""
        return max(self.compute_s, self.memory_s) + self.start_s

    @property
    def bound(self) -> str:
        """What limits it: "compute" or the memory level."""
        return "compute" if self.compute_s >= self.memory_s else self.level


def rates_of(device: Device, kinds: Mapping[str, float] | None = None) -> Rates:
    """Rates of a machine file's device: its peaks per core, the sustained bandwidth of its main memory (the peak where
    none was measured), the bandwidths of other levels. `kinds` adds or replaces rates per core.

    Raises InputError where the device states no number of cores or no main-memory bandwidth.
    """
    main, cores = device.main_memory, device.cores
    bandwidth = main.sustained or main.bandwidth
    if cores is None or bandwidth is None:
        raise InputError(
            f"{device.title or 'The device'} states no {'cores' if cores is None else 'memory bandwidth'}."
        )
    count = int(cores.value)
    operations = {name: rate.value / count for name, rate in device.compute.vector.items()}
    operations |= {f"matrix {name}": rate.value / count for name, rate in device.compute.matrix.items()}
    levels = {name: memory for name, memory in device.memories.items() if memory.bandwidth is not None}
    traffic = {name: memory.bandwidth.value for name, memory in levels.items() if memory.bandwidth is not None}
    private = frozenset(name for name, memory in levels.items() if memory.per == "core")
    start = device.launch_overhead.value if device.launch_overhead else 0.0
    return Rates({**operations, **(kinds or {})}, {**traffic, "memory": bandwidth.value}, count, start, private)


def predict(work: Work, rates: Rates, threads: int | None = None) -> Cost:
    """Time of `work` on so many cores (default all). Raises InputError for kinds and levels without a rate."""
    cores = rates.cores if threads is None else threads
    if cores < 1:
        raise InputError(f"{cores} cores asked for; expected at least one.")
    seconds = 0.0
    for kind, count in work.operations.items():
        if count and kind not in rates.operations_per_s:
            raise InputError(f"No rate for {kind!r} operations; known are {', '.join(sorted(rates.operations_per_s))}.")
        seconds += count / rates.operations_per_s[kind] if count else 0.0
    used = min(cores, work.pieces)
    times = {}
    for level, count in work.traffic.items():
        if count and level not in rates.bytes_per_s:
            raise InputError(f"No bandwidth of {level!r}; known are {', '.join(sorted(rates.bytes_per_s))}.")
        bandwidth = rates.bytes_per_s.get(level, 1.0) * (used if level in rates.private else 1)
        times[level] = count / bandwidth
    slowest = max(times, key=lambda level: times[level], default="memory")
    compute = seconds * ceil(work.pieces / cores) / work.pieces
    return Cost(compute, times.get(slowest, 0.0), work.launches * rates.start_s, slowest)
