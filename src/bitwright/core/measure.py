"""Measure this computer and describe it as a machine: rates, streaming bandwidth, overhead. Evidence: executed.

Every figure is the best of several repeats. The measurement is refused when something else was using the processor:
when a fixed probe, run before, between and after, varies by more than 1.3 times, or when the operating system accounts
more than a tenth of a core to other processes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.files import write_whole
from bitwright.core.machine import THIS_MACHINE, Machine, machine_from_data, this_machine_path
from bitwright.core.progress import progress

BUSY_RATIO = 1.3
BUSY_CORES = 0.1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _last_level_cache_bytes() -> int | None:
    """Size of the largest cache the operating system reports for the first core; None where it reports none."""
    best = None
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            size = int(text[:-1]) * {"K": 1024, "M": 1024**2}[text[-1]]
        except (OSError, ValueError, KeyError):
            continue
        best = max(best or 0, size)
    return best


def _best_time(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _probe() -> float:
    """Seconds of a fixed piece of single-threaded work, the same every time."""
    values = np.arange(200_000, dtype=np.int64)
    start = time.perf_counter()
    for _ in range(40):
        values = (values * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
    return time.perf_counter() - start


def _processor_seconds() -> tuple[float, float]:
    """Processor seconds of this process and its threads, and of everything that runs on this computer."""
    own, everything = psutil.Process().cpu_times(), psutil.cpu_times()
    idle = everything.idle + getattr(everything, "iowait", 0.0)
    guest = getattr(everything, "guest", 0.0) + getattr(everything, "guest_nice", 0.0)  # counted in user already
    return own.user + own.system, sum(everything) - idle - guest


def _gemm_rates(size: int, repeats: int) -> dict[str, float]:
    """Operations per second of square matrix products in the formats torch multiplies on this processor."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=generator)
    right = torch.randn(size, size, generator=generator)
    work = 2.0 * size**3
    rates = {"fp32": work / _best_time(lambda: left @ right, repeats)}
    left16, right16 = left.bfloat16(), right.bfloat16()
    rates["bf16"] = work / _best_time(lambda: left16 @ right16, repeats)
    left8 = torch.randint(-128, 128, (size, size), dtype=torch.int8, generator=generator)
    right8 = torch.randint(-128, 128, (size, size), dtype=torch.int8, generator=generator)
    try:
        torch._int_mm(left8, right8)
    except (AttributeError, NotImplementedError, RuntimeError):
        return rates  # this build of torch has no int8 product on this processor
    rates["int8"] = work / _best_time(lambda: torch._int_mm(left8, right8), repeats)
    return rates


def _vector_rate(repeats: int) -> float:
    """fp32 operations per second of element-wise work on data in the nearest caches."""
    import torch

    values = torch.ones(32768 * torch.get_num_threads())
    other, out = torch.full_like(values, 0.5), torch.empty_like(values)

    def run() -> None:
        for _ in range(200):
            torch.addcmul(values, values, other, out=out)

    return 200 * 3 * values.numel() / _best_time(run, repeats)  # an addcmul is two products and a sum


def _stream_rates(size_bytes: int, repeats: int) -> tuple[float, float]:
    """Bytes per second of reading (a sum) and of copying (read and written bytes together) large fp32 tensors."""
    import torch

    source = torch.ones(size_bytes // 4)
    target = torch.empty_like(source)
    read = source.numel() * 4 / _best_time(source.sum, repeats)
    copy = 2 * source.numel() * 4 / _best_time(lambda: target.copy_(source), repeats)
    return read, copy


def _call_overhead(repeats: int) -> float:
    """Seconds of a torch operator on one element: what a call costs beside its work."""
    import torch

    value = torch.ones(1)

    def run() -> None:
        for _ in range(1000):
            torch.add(value, value)

    return _best_time(run, repeats) / 1000


def measure_this_machine(
    *, size: int = 1536, stream_bytes: int = 256 * 2**20, repeats: int = 5, threads: int | None = None,
    require_idle: bool = True,
) -> Machine:  # fmt: skip
    """Measure this computer with torch on `threads` threads (all cores by default) in some ten seconds.

    Raises BitwrightError when the computer was busy (see the module). With `require_idle` off, the figures are kept and
    marked "measured on a busy machine" in `notes`.
    """
    import torch

    if size < 16 or size % 8 or stream_bytes < 2**20 or repeats < 1:
        raise InputError("measure: size must be a multiple of 8 and at least 16, stream_bytes >= 1 MiB, repeats >= 1.")
    before, load = torch.get_num_threads(), os.getloadavg()[0]
    count = threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    probes: list[float] = []
    results: list[Any] = []
    steps: list[Callable[[], Any]] = [
        lambda: _gemm_rates(size, repeats),
        lambda: _vector_rate(repeats),
        lambda: _stream_rates(stream_bytes, repeats),
        lambda: _call_overhead(repeats),
    ]
    torch.set_num_threads(count)
    started, (own, everything) = time.perf_counter(), _processor_seconds()
    try:
        with torch.inference_mode(), progress("Measuring this machine", len(steps)) as advance:
            for _ in range(20):  # warm up: caches, clock
                _probe()
            for step in steps:
                probes.append(min(_probe() for _ in range(8)))
                results.append(step())
                advance(1)
            probes.append(min(_probe() for _ in range(8)))
    finally:
        torch.set_num_threads(before)
    own_after, everything_after = _processor_seconds()
    others = max(0.0, (everything_after - everything) - (own_after - own)) / (time.perf_counter() - started)
    variation = max(probes) / min(probes)
    busy = variation > BUSY_RATIO or others > BUSY_CORES
    state = f"load average {load:.2f}, probe {variation:.2f}x, {others:.2f} cores used by others"
    if busy and require_idle:
        raise BitwrightError(
            f"This machine is busy ({state}), so the figures would be too low. Try again when it is idle."
        )
    rates, vector, (read, copy), overhead = results
    stamp = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    how = f"measured {stamp}, torch {torch.__version__}, {count} threads, {state}"
    executed = {"source": how, "evidence": "executed"}

    def figure(value: float, unit: str, note: str) -> dict[str, str]:
        return {"value": f"{value!r} {unit}".strip(), "source": f"{note}; {how}", "evidence": "executed"}

    memories: dict[str, Any] = {}
    cache = _last_level_cache_bytes()
    if cache:
        memories["cache"] = {"capacity": figure(cache, "B", "as the operating system reports it")}
    memories["dram"] = {
        "capacity": figure(psutil.virtual_memory().total, "B", "as the operating system reports it"),
        "bandwidth": figure(max(read, copy), "B/s", "the larger of reading and copying"),
        "sustained": figure(read, "B/s", f"sum of {stream_bytes} B"),
    }
    data: dict[str, Any] = {
        "name": THIS_MACHINE,
        "title": f"{_cpu_model()}, {count} cores",
        "devices": {"cpu": {
            "title": _cpu_model(),
            "kind": "cpu",
            "cores": {"value": count, **executed},
            "compute": {
                "matrix": {name: figure(rate, "OP/s" if name.startswith("int") else "FLOP/s", f"{size}^3 product")
                           for name, rate in rates.items()},
                "vector": {"fp32": figure(vector, "FLOP/s", "addcmul in cache")},
            },
            "launch_overhead": figure(overhead, "s", "one-element addition"),
            "memories": memories,
        }},
        "notes": [f"measured on a busy machine ({state})"] if busy else [],
    }  # fmt: skip
    return machine_from_data(data, THIS_MACHINE)


def measure_and_store(**options: Any) -> tuple[Machine, Path]:
    """Measure this computer (options of `measure_this_machine`) and keep it for `load_machine("this-machine")`."""
    machine = measure_this_machine(**options)
    path = this_machine_path()
    write_whole(path, machine.to_yaml())
    return machine, path
