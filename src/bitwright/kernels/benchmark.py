"""A kernel beside its peers on this machine, and beside the time that its counts of work predict.

All sides of a case run in one process, one after the other and again, so that a disturbance meets all of them; medians
are compared. Evidence of times: executed; of limits: predicted, from the rates of the measured machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from time import perf_counter
from typing import Any

from bitwright import _native
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.machine import THIS_MACHINE, Machine, load_machine, this_machine_path
from bitwright.core.measure import measure_and_store
from bitwright.kernels.work import Cost, Rates, Work, predict, rates_of

_ROUNDS = 2_000_000  # some ten milliseconds
_LEAST_S = 2e-3  # a sample lasts at least so long: short calls are repeated within it


@dataclass(frozen=True)
class Case:
    """One computation that a kernel and its peers do: `run(threads)` and peers by name, called with as many threads,
    which are torch's as well while they run. `work` counts what the kernel does; `kinds` adds rates per core for
    kinds of operations that a machine file does not state. `useful` operations are those a user asked for, by which
    all sides are placed in the roofline plot (default: all operations of `work`)."""

    kernel: str
    title: str
    run: Callable[[int], Any]
    peers: Mapping[str, Callable[[int], Any]]
    work: Work
    kinds: Mapping[str, float] = field(default_factory=dict)
    useful: float | None = None

    @property
    def operations(self) -> float:
        """Operations that the user asked for."""
        return self.useful if self.useful is not None else sum(self.work.operations.values())

    @property
    def intensity(self) -> float:
        """Useful operations per byte of main memory."""
        return self.operations / max(self.work.traffic.get("memory", 0.0), 1.0)


@dataclass(frozen=True)
class Timing:
    """Median seconds of the kernel and of its peers on so many threads, and what the kernel's work predicts."""

    case: Case
    threads: int
    time_s: float
    peers_s: Mapping[str, float]
    limit: Cost

    @property
    def fastest_peer(self) -> str:
        """Name of the fastest peer; empty without peers."""
        return min(self.peers_s, key=lambda name: self.peers_s[name], default="")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kernel": self.case.kernel, "case": self.case.title, "threads": self.threads, "evidence": "executed",
            "time_s": self.time_s, "peers_s": dict(self.peers_s),
            "times_as_fast_as": {name: each / self.time_s for name, each in self.peers_s.items()},
            "predicted_s": self.limit.time_s, "bound": self.limit.bound,
            "operations_per_s": self.case.operations / self.time_s, "operations_per_byte": self.case.intensity,
        }  # fmt: skip


def this_machine() -> Machine:
    """The measured description of this computer; measured now, and kept, when there is none."""
    if not this_machine_path().exists():
        return measure_and_store(require_idle=False)[0]
    return load_machine(THIS_MACHINE)


@cache
def peak_rates() -> dict[str, float]:
    """Operations per second of one core in loops that stay in registers: "fp32" and "matrix fp32" by fused
    multiply-adds, "additions" of fp32, "matrix int8" by dot products where this CPU has them."""
    rates = {}
    for kind in ("multiply-add", "add", "int8 dot product"):
        samples = []
        for _ in range(5):
            start = perf_counter()
            per_round = _native.run_rounds(kind, _ROUNDS)
            samples.append(per_round * _ROUNDS / (perf_counter() - start))
        rates[kind] = max(samples)
    found = {"fp32": rates["multiply-add"], "matrix fp32": rates["multiply-add"], "additions": rates["add"]}
    return found | ({"matrix int8": rates["int8 dot product"]} if rates["int8 dot product"] else {})


def measure(case: Case, rates: Rates, threads: int = 1, repeats: int = 9) -> Timing:
    """Time all sides of a case, interleaved, `repeats` samples each. Raises InputError for fewer than one."""
    import torch

    if repeats < 1 or threads < 1:
        raise InputError(f"{repeats} repeats on {threads} threads asked for; expected at least one of each.")
    before = torch.get_num_threads()
    sides: dict[str, Callable[[int], Any]] = {"": case.run, **case.peers}
    found: dict[str, list[float]] = {name: [] for name in sides}
    try:
        torch.set_num_threads(threads)
        inner: dict[str, int] = {}
        for name, side in sides.items():
            side(threads)  # what is made once: packing, code for this shape, threads
            start = perf_counter()
            side(threads)
            inner[name] = max(1, int(_LEAST_S / max(perf_counter() - start, 1e-9)))
        for _ in range(repeats):
            for name, side in sides.items():
                side(threads)  # until the other side's threads sleep, and the caches hold this side's operands
                start = perf_counter()
                for _ in range(inner[name]):
                    side(threads)
                found[name].append((perf_counter() - start) / inner[name])
    finally:
        torch.set_num_threads(before)
    times = {name: median(each) for name, each in found.items()}
    all_rates = Rates(
        {**rates.operations_per_s, **case.kinds}, rates.bytes_per_s, rates.cores, rates.start_s, rates.private
    )
    return Timing(case, threads, times.pop(""), times, predict(case.work, all_rates, threads))


def run(
    names: Sequence[str], cases: Mapping[str, Callable[[], Sequence[Case]]], threads: Sequence[int] = (1, 2),
    repeats: int = 9,
) -> list[Timing]:  # fmt: skip
    """Time the cases of the named kernels (all without names) on each count of threads.

    Raises UnknownNameError for a name without cases.
    """
    from bitwright.core.progress import progress

    for name in names:
        if name not in cases:
            raise UnknownNameError("kernel", name, list(cases))
    rates = rates_of(this_machine().device(), peak_rates())
    chosen = [case for name in (names or cases) for case in cases[name]()]
    timings = []
    with progress("Timing kernels", len(chosen) * len(threads)) as advance:
        for case in chosen:
            for count in threads:
                timings.append(measure(case, rates, count, repeats))
                advance(1)
    return timings
