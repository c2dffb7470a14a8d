"""A million tasks through `bitwright.core.timeline`: seconds to build, simulate and analyse, written to JSON.

Two shapes of work, both of 10^6 tasks on 64 streams and 64 links: a pipeline (micro-batches through stages, one task
each for the computation and the transfer) added in bulk, and random dependencies on the last thousand tasks added one
by one with a memory. Every schedule is checked: no task starts before what it depends on ended, and no unit-capacity
resource runs two tasks at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import BitwrightError
from bitwright.core.files import write_json
from bitwright.core.timeline import Schedule, Timeline

RESULT = Path(__file__).parent / "results" / "timeline_million_tasks.json"
STAGES = 64


def pipeline(tasks: int) -> tuple[Timeline, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Micro-batches through stages: task 2 * (batch * STAGES + stage) computes, the next one sends its result on."""
    timeline = Timeline()
    streams = [timeline.resource(f"stage {stage}") for stage in range(STAGES)]
    links = [timeline.resource(f"link {stage}") for stage in range(STAGES)]
    index = np.arange(tasks)
    stage = index // 2 % STAGES
    resource = np.where(index % 2, np.array(links)[stage], np.array(streams)[stage])
    duration = np.where(index % 2, 0.1e-3, 1e-3 * (1 + stage % 3))
    later = index[(index % (2 * STAGES)) > 0]
    earlier = later - 1
    timeline.tasks(duration, resource, after=(earlier, later))
    return timeline, earlier, later, resource


def random_tasks(tasks: int) -> tuple[Timeline, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Each task depends on one of the thousand before it and holds memory while it runs."""
    generator = np.random.default_rng(0)
    timeline = Timeline()
    units = [timeline.resource(f"unit {unit}") for unit in range(2 * STAGES)]
    memory = timeline.memory("memory", 2**30)
    resource = generator.integers(0, len(units), tasks)
    later = np.arange(1, tasks)
    earlier = np.maximum(later - generator.integers(1, 1001, tasks - 1), 0)
    durations, before = generator.uniform(1e-6, 1e-3, tasks).tolist(), [-1, *earlier.tolist()]
    held = {memory: float(2**20)}
    for index, unit in enumerate(resource.tolist()):
        after = (before[index],) if index else ()
        timeline.task("task", durations[index], (units[unit],), after=after, allocates=held, frees=held)
    return timeline, earlier, later, resource


def check(
    schedule: Schedule, earlier: NDArray[np.int64], later: NDArray[np.int64], resource: NDArray[np.int64]
) -> None:
    """Raise BitwrightError when the schedule breaks a dependency or oversubscribes a resource."""
    start, finish = np.asarray(schedule.start), np.asarray(schedule.finish)
    if (start[later] < finish[earlier]).any():
        raise BitwrightError("A task started before a task it depends on ended.")
    order = np.lexsort((finish, start, resource))
    same = resource[order][1:] == resource[order][:-1]
    if (start[order][1:][same] < finish[order][:-1][same]).any():
        raise BitwrightError("Two tasks held one resource at the same time.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    results = {}
    for name, build in (("pipeline, added in bulk", pipeline), ("random, added one by one, with memory", random_tasks)):
        times = [time.perf_counter()]
        timeline, earlier, later, resource = build(options.tasks)
        times.append(time.perf_counter())
        schedule = timeline.simulate()
        times.append(time.perf_counter())
        critical = len(schedule.critical_path())
        utilisation = schedule.utilisation()
        times.append(time.perf_counter())
        check(schedule, earlier, later, resource)
        seconds = dict(zip(("build_s", "simulate_s", "analyse_s"), np.diff(times).tolist(), strict=True))
        results[name] = {
            "tasks": options.tasks, **seconds, "total_s": times[-1] - times[0], "makespan_s": schedule.makespan,
            "critical_path_tasks": critical, "busiest_resource": max(utilisation.values()),
        }  # fmt: skip
        print(name, results[name])
    write_json(options.output, {"evidence": "executed", "results": results})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitwrightError as error:
        sys.exit(str(error))
