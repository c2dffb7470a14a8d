"""The native simulation against a brute-force reference that scans every task at every instant."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.timeline import Timeline

CAPACITIES = (1, 2, 100.0)  # two resources and a memory


@st.composite
def task_sets(draw):
    tasks = []
    for index in range(draw(st.integers(1, 14))):
        before = draw(st.lists(st.integers(0, index - 1), max_size=3, unique=True)) if index else []
        tasks.append(
            {
                "duration": draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0])),
                "resources": draw(st.lists(st.integers(0, 1), max_size=2, unique=True)),
                "bytes": draw(st.sampled_from([0.0, 0.0, 30.0, 60.0, 100.0])),
                "after": before,
                "priority": draw(st.integers(-1, 1)),
            }
        )
    return tasks


def build(tasks):
    timeline = Timeline()
    timeline.resource("stream", CAPACITIES[0])
    timeline.resource("link", CAPACITIES[1])
    timeline.memory("memory", CAPACITIES[2])
    for index, task in enumerate(tasks):
        amounts = {2: task["bytes"]} if task["bytes"] else {}
        timeline.task(
            f"t{index}", task["duration"], task["resources"], task["after"], amounts, amounts, priority=task["priority"]
        )
    return timeline


def brute_force(tasks):
    free = list(CAPACITIES)
    start, finish = [None] * len(tasks), [None] * len(tasks)
    now = 0.0

    def needs(task):
        return [(store, 1) for store in task["resources"]] + ([(2, task["bytes"])] if task["bytes"] else [])

    while True:
        started = True
        while started:
            started = False
            # Tasks of no duration end at the instant they start, but only after everything that can start has started.
            for index in sorted(range(len(tasks)), key=lambda i: (tasks[i]["priority"], i)):
                task = tasks[index]
                ready = start[index] is None and all(
                    finish[b] is not None and finish[b] <= now and b in done for b in task["after"]
                )
                if ready and all(free[store] >= amount for store, amount in needs(task)):
                    for store, amount in needs(task):
                        free[store] -= amount
                    start[index] = now
                    finish[index] = now + task["duration"]
            ending = [i for i in range(len(tasks)) if start[i] is not None and finish[i] == now and i not in done]
            for index in ending:
                done.add(index)
                started = True
                for store, amount in needs(tasks[index]):
                    free[store] += amount
        coming = [finish[i] for i in range(len(tasks)) if start[i] is not None and i not in done]
        if not coming:
            return start, finish
        now = min(coming)
        for index in range(len(tasks)):
            if start[index] is not None and finish[index] == now and index not in done:
                done.add(index)
                for store, amount in needs(tasks[index]):
                    free[store] += amount


done: set[int] = set()


@settings(max_examples=300, deadline=None)
@given(task_sets())
def test_spans_equal_the_brute_force_reference(tasks):
    done.clear()
    start, finish = brute_force(tasks)
    schedule = build(tasks).simulate()
    assert schedule.start.tolist() == start
    assert schedule.finish.tolist() == finish


@settings(max_examples=200, deadline=None)
@given(task_sets())
def test_schedules_respect_dependencies_and_capacities(tasks):
    schedule = build(tasks).simulate()
    for index, task in enumerate(tasks):
        for before in task["after"]:
            assert schedule.finish[before] <= schedule.start[index]
    for store in (0, 1):
        for instant in schedule.start:
            holding = [
                i
                for i, task in enumerate(tasks)
                if store in task["resources"] and schedule.start[i] <= instant < schedule.finish[i]
            ]
            assert len(holding) <= CAPACITIES[store]
    assert schedule.peak_bytes("memory") <= CAPACITIES[2]
    assert schedule.memory_over_time("memory")[1].tolist()[-1:] in ([], [0.0])


@settings(max_examples=200, deadline=None)
@given(task_sets())
def test_the_critical_path_has_no_gaps(tasks):
    schedule = build(tasks).simulate()
    path = schedule.critical_path()
    assert schedule.start[path[0]] == 0
    assert schedule.finish[path[-1]] == schedule.makespan
    for earlier, later in itertools.pairwise(path):
        assert schedule.finish[earlier] == schedule.start[later]


def test_many_tasks_at_once_equal_tasks_one_by_one():
    rng = np.random.default_rng(1)
    durations, held = rng.integers(1, 9, 200) / 4, rng.integers(0, 3, 200)
    later = np.arange(1, 200)
    earlier = (rng.random(199) * later).astype(int)
    at_once, one_by_one = Timeline(), Timeline()
    for timeline in (at_once, one_by_one):
        for index in range(3):
            timeline.resource(f"r{index}")
    at_once.tasks(durations, held, (earlier, later))
    for index in range(200):
        before = [int(earlier[index - 1])] if index else []
        one_by_one.task(f"t{index}", durations[index], [held[index]], before)
    assert np.array_equal(at_once.simulate().start, one_by_one.simulate().start)


def pipeline():
    timeline = Timeline()
    stream = timeline.resource("stream")
    link = timeline.resource("link")
    memory = timeline.memory("HBM", 10)
    load = timeline.task("load", 2, [link], allocates={memory: 6}, category="memory")
    timeline.task("compute", 3, [stream], [load], frees={memory: 6}, category="matmul")
    timeline.task("next load", 2, [link], allocates={memory: 6}, category="memory")
    return timeline.simulate()


def test_memory_makes_a_load_wait_and_shows_on_the_critical_path():
    schedule = pipeline()
    assert schedule.start.tolist() == [0, 2, 5]
    assert [schedule.names[i] for i in schedule.critical_path()] == ["load", "compute", "next load"]
    assert schedule.utilisation() == {"stream": pytest.approx(3 / 7), "link": pytest.approx(4 / 7)}
    times, used = schedule.memory_over_time("HBM")
    assert times.tolist() == [0, 5]
    assert used.tolist() == [6, 6]


def test_the_trace_has_a_track_per_resource_and_a_counter_per_memory(tmp_path):
    path = tmp_path / "trace.json"
    pipeline().write_trace(path)
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in spans][1] == ("compute", 2e6, 3e6)
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} >= {"stream", "link"}
    assert [event["args"]["bytes"] for event in events if event["ph"] == "C"] == [6, 6]


def test_the_gantt_plot_has_a_bar_per_task():
    figure = pipeline().gantt()
    assert sum(len(bar.x) for bar in figure.data) == 3
    assert {int(row) for bar in figure.data for row in bar.y} == {0, 1}
    assert list(figure.layout.yaxis.ticktext) == ["stream", "link"]


def test_a_gantt_plot_of_many_tasks_shows_busy_shares():
    timeline = Timeline()
    stream, link = timeline.resource("stream"), timeline.resource("link", 2)
    durations = np.full(2000, 0.5)
    first = timeline.tasks(durations, stream, (np.arange(1999), np.arange(1, 2000)))
    for index in range(1000):  # the link is busy in the second half of every second
        timeline.task("move", 0.5, [link], [first[2 * index]], category="move")
    schedule = timeline.simulate()
    bars = {bar.name: -np.array(bar.y) / 0.9 for bar in schedule.gantt().data}
    assert np.allclose(bars["task"], 1)
    assert bars["move"].mean() == pytest.approx(1000 * 0.5 / (2 * schedule.makespan))


def test_memory_that_never_fits_names_the_task():
    timeline = Timeline()
    memory = timeline.memory("HBM", 10)
    timeline.task("weights", 1, allocates={memory: 11})
    with pytest.raises(BitwrightError, match="'weights' waits for 11 B in 'HBM'"):
        timeline.simulate()


def test_a_circle_names_its_tasks():
    timeline = Timeline()
    timeline.task("a", 1, after=[1])
    timeline.task("b", 1, after=[0])
    with pytest.raises(BitwrightError, match=r"circle.*'a', 'b'"):
        timeline.simulate()


def test_freeing_more_than_was_allocated_is_refused():
    timeline = Timeline()
    memory = timeline.memory("HBM", 10)
    timeline.task("t", 1, frees={memory: 1})
    with pytest.raises(InputError, match="frees more"):
        timeline.simulate()


@pytest.mark.parametrize("duration", [-1, math.nan, math.inf])
def test_durations_must_be_finite_and_not_negative(duration):
    with pytest.raises(InputError, match="duration"):
        Timeline().task("t", duration)


def test_unknown_resources_and_tasks_are_refused():
    timeline = Timeline()
    with pytest.raises(InputError, match="resource 3"):
        timeline.task("t", 1, [3])
    timeline.task("t", 1, after=[7])
    with pytest.raises(InputError, match="never added"):
        timeline.simulate()
    with pytest.raises(InputError, match="capacity"):
        timeline.resource("r", 0)


def test_an_empty_timeline_takes_no_time():
    assert Timeline().simulate().makespan == 0
