"""Tasks in time: dependencies, resources and memories in; spans, critical path, utilisation and memory use out.

The simulation is greedy and deterministic: whenever something ends, every task that is ready and whose resources and
memory are free starts, lower priority values first, ties by the order in which tasks were added.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.files import write_whole

_Amounts = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]
_GANTT_BARS, _GANTT_INTERVALS = 1000, 400
_COLOURS = (
    "#636efa",
    "#ef553b",
    "#00cc96",
    "#ab63fa",
    "#ffa15a",
    "#19d3f3",
    "#ff6692",
    "#b6e880",
    "#ff97ff",
    "#fecb52",
)


@dataclass(frozen=True)
class Store:
    """What tasks take and give back: a resource (units) or a memory (bytes)."""

    name: str
    capacity: float
    memory: bool


@dataclass
class _Ragged:
    """Rows of integers, each with an amount, kept flat: row i ends at `ends[i]`."""

    ends: array[int] = field(default_factory=lambda: array("q", [0]))
    entries: array[int] = field(default_factory=lambda: array("i"))
    amounts: array[float] = field(default_factory=lambda: array("d"))

    def close_row(self) -> None:
        self.ends.append(len(self.entries))

    def row(self, index: int) -> list[tuple[int, float]]:
        part = slice(self.ends[index], self.ends[index + 1])
        return list(zip(self.entries[part], self.amounts[part], strict=True))

    def arrays(self) -> _Amounts:
        return np.array(self.ends, np.int64), np.array(self.entries, np.int32), np.array(self.amounts, float)


@dataclass
class Timeline:
    """Builds a set of tasks; `simulate` runs it. Times in seconds, memory in bytes."""

    _stores: list[Store] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _categories: list[str] = field(default_factory=list)
    _durations: list[float] = field(default_factory=list)
    _priorities: list[int] = field(default_factory=list)
    _after: _Ragged = field(default_factory=_Ragged)
    _takes: _Ragged = field(default_factory=_Ragged)
    _gives: _Ragged = field(default_factory=_Ragged)

    def resource(self, name: str, capacity: int = 1) -> int:
        """Add a resource that `capacity` tasks can hold at once (a compute stream, a link); returns its index."""
        if capacity < 1:
            raise InputError(f"Resource {name!r} has capacity {capacity}; it must be at least 1.")
        return self._add_store(Store(name, capacity, memory=False))

    def memory(self, name: str, capacity_bytes: float = math.inf) -> int:
        """Add a memory of `capacity_bytes`; tasks that allocate in it wait until there is room; returns its index."""
        if not capacity_bytes > 0:
            raise InputError(f"Memory {name!r} has capacity {capacity_bytes} B; it must be greater than zero.")
        return self._add_store(Store(name, capacity_bytes, memory=True))

    def _add_store(self, store: Store) -> int:
        self._stores.append(store)
        return len(self._stores) - 1

    def task(
        self,
        name: str,
        duration_s: float,
        resources: Iterable[int] = (),
        after: Iterable[int] = (),
        allocates: Mapping[int, float] | None = None,
        frees: Mapping[int, float] | None = None,
        category: str = "",
        priority: int = 0,
    ) -> int:
        """Add a task that holds `resources` for `duration_s` once the tasks `after` have ended; returns its index.

        It allocates bytes in memories when it starts and frees bytes when it ends (its own or an earlier task's).
        Raises InputError for a negative or non-finite duration or amount and for unknown resources, memories or tasks.
        """
        if not (math.isfinite(duration_s) and duration_s >= 0):
            raise InputError(f"Task {name!r} has duration {duration_s} s; it must be finite and not negative.")
        index = len(self._names)
        before = tuple(after)
        if before and (min(before) < 0 or index in before):
            raise InputError(f"Task {name!r} depends on itself or on a negative index.")
        # Everything is checked before anything is added, so that a refused task leaves nothing behind.
        held = tuple(dict.fromkeys(resources))
        self._check_stores(name, ((resource, 1.0) for resource in held), memory=False)
        for pairs in (allocates, frees):
            if pairs:
                self._check_stores(name, pairs.items(), memory=True)
        self._names.append(name)
        self._categories.append(category)
        self._durations.append(duration_s)
        self._priorities.append(priority)
        self._after.entries.extend(before)
        self._after.amounts.extend([1.0] * len(before))
        self._after.close_row()
        for rows, amounts in ((self._takes, allocates), (self._gives, frees)):
            rows.entries.extend(held)
            rows.amounts.extend([1.0] * len(held))
            if amounts:
                rows.entries.extend(amounts.keys())
                rows.amounts.extend(amounts.values())
            rows.close_row()
        return index

    def _check_stores(self, name: str, pairs: Iterable[tuple[int, float]], memory: bool) -> None:
        for store, amount in pairs:
            if not 0 <= store < len(self._stores) or self._stores[store].memory is not memory:
                kind = "memory" if memory else "resource"
                raise InputError(f"Task {name!r} names {kind} {store}, which was not added.")
            if not (math.isfinite(amount) and amount >= 0):
                raise InputError(f"Task {name!r} allocates or frees {amount} B in {self._stores[store].name!r}.")

    def tasks(
        self,
        durations_s: ArrayLike,
        resources: ArrayLike,
        after: tuple[ArrayLike, ArrayLike] | None = None,
        name: str = "task",
        category: str = "",
    ) -> range:
        """Add many tasks at once: one resource each, dependencies as pairs of arrays (earlier task, later task).

        `durations_s` and `resources` have shape (tasks,); the indices in `after` count within this call. Returns the
        indices of the new tasks.
        """
        durations = np.asarray(durations_s, float)
        held = np.broadcast_to(np.asarray(resources, int), durations.shape)
        if not (np.isfinite(durations).all() and (durations >= 0).all()):
            raise InputError("Every duration must be finite and not negative.")
        for store in np.unique(held).tolist():
            self._check_stores(name, [(store, 1.0)], memory=False)
        count, base = len(durations), len(self._names)
        sources = np.empty(0, np.int32)
        bounds = np.zeros(count + 1, np.int64)
        if after is not None:
            earlier, later = (np.asarray(index, int) for index in after)
            if len(earlier) and (min(earlier.min(), later.min()) < 0 or max(earlier.max(), later.max()) >= count):
                raise InputError(f"A dependency names a task outside 0..{count - 1}.")
            order = np.argsort(later, kind="stable")
            bounds = np.searchsorted(later[order], np.arange(count + 1))
            sources = (earlier[order] + base).astype(np.int32)
        _append(self._after, sources, bounds[1:])
        for rows in (self._takes, self._gives):
            _append(rows, held.astype(np.int32), np.arange(1, count + 1))
        self._names.extend(f"{name} {index}" for index in range(count))
        self._categories.extend([category] * count)
        self._durations.extend(durations.tolist())
        self._priorities.extend([0] * count)
        return range(base, base + count)

    def simulate(self) -> Schedule:
        """Run the tasks.

        Raises BitwrightError when tasks wait for each other in a circle or for memory that can never be free; the
        message names some of them.
        """
        count = len(self._names)
        durations = np.array(self._durations, float)
        start, finish = np.empty(count), np.empty(count)
        cause = np.empty(count, np.int32)
        after_offsets, after, _ = self._after.arrays()
        if len(after) and after.max() >= count:
            late = int(np.searchsorted(after_offsets, np.flatnonzero(after >= count)[0], side="right")) - 1
            raise InputError(f"Task {self._names[late]!r} depends on a task that was never added.")
        takes_offsets, takes, take_amounts = self._takes.arrays()
        gives_offsets, gives, give_amounts = self._gives.arrays()
        capacities = np.array([store.capacity for store in self._stores], float)
        try:
            finished = _native.simulate_timeline(
                durations, np.array(self._priorities, np.int64), after_offsets, after, takes_offsets, takes,
                take_amounts, gives_offsets, gives, give_amounts, capacities, start, finish, cause,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(f"The tasks cannot be simulated: {error}.") from None
        if finished < count:
            self._explain_deadlock(finish)
        takes_table = (takes_offsets, takes, take_amounts)
        gives_table = (gives_offsets, gives, give_amounts)
        return Schedule(
            tuple(self._stores), self._names, self._categories, start, finish, cause, takes_table, gives_table
        )

    def _explain_deadlock(self, finish: NDArray[np.float64]) -> None:
        stuck = np.flatnonzero(finish < 0).tolist()
        waiting = [task for task in stuck if all(finish[before] >= 0 for before, _ in self._after.row(task))]
        if not waiting:
            names = ", ".join(repr(self._names[task]) for task in stuck[:5])
            raise BitwrightError(f"{len(stuck)} tasks wait for each other in a circle, among them {names}.")
        first = waiting[0]
        wants = ", ".join(
            f"{amount:.6g} B in {self._stores[store].name!r} (capacity {self._stores[store].capacity:.6g} B)"
            for store, amount in self._takes.row(first)
            if self._stores[store].memory
        )
        raise BitwrightError(
            f"{len(stuck)} tasks can never start: task {self._names[first]!r} waits for {wants}, and nothing that runs "
            "frees it."
        )


def _append(rows: _Ragged, entries: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
    """Add rows of unit amounts; `ends` counts from the first of these entries."""
    start = len(rows.entries)
    rows.entries.frombytes(entries.astype(np.intc).tobytes())
    rows.amounts.frombytes(np.ones(len(entries)).tobytes())
    rows.ends.frombytes((ends + start).astype(np.int64).tobytes())


@dataclass(frozen=True)
class Schedule:
    """When every task ran. `cause[i]` is the task whose end let task i start, -1 for a start at time zero."""

    stores: tuple[Store, ...]
    names: Sequence[str]
    categories: Sequence[str]
    start: NDArray[np.float64]
    finish: NDArray[np.float64]
    cause: NDArray[np.int32]
    takes: _Amounts = field(repr=False)
    gives: _Amounts = field(repr=False)

    @property
    def makespan(self) -> float:
        """Time at which the last task ends, seconds."""
        return float(self.finish.max()) if len(self.finish) else 0.0

    def critical_path(self) -> list[int]:
        """Tasks that follow each other without a gap from time zero to the makespan, waits for resources included."""
        if not len(self.finish):
            return []
        path = [int(self.finish.argmax())]
        while self.cause[path[-1]] >= 0:
            path.append(int(self.cause[path[-1]]))
        return path[::-1]

    def utilisation(self) -> dict[str, float]:
        """Busy share of every resource's capacity over the makespan."""
        span = self.makespan
        busy = np.zeros(len(self.stores))
        tasks = np.repeat(np.arange(len(self.start)), np.diff(self.takes[0]))
        np.add.at(busy, self.takes[1], (self.finish - self.start)[tasks] * self.takes[2])
        return {
            store.name: float(busy[index] / (store.capacity * span)) if span else 0.0
            for index, store in enumerate(self.stores)
            if not store.memory
        }

    def task_times(self) -> dict[str, float]:
        """Duration of every task by name; tasks of the same name add up."""
        times: dict[str, float] = {}
        for name, duration in zip(self.names, (self.finish - self.start).tolist(), strict=True):
            times[name] = times.get(name, 0.0) + duration
        return times

    def memory_over_time(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bytes in use in a memory as a step function: times, and bytes from each time on.

        Raises InputError when there is no memory of that name.
        """
        memories = {store.name: index for index, store in enumerate(self.stores) if store.memory}
        if name not in memories:
            raise InputError(f"There is no memory {name!r}; there are: {', '.join(memories) or 'none'}.")
        times, changes = [], []
        for (offsets, stores, amounts), when, sign in ((self.takes, self.start, 1), (self.gives, self.finish, -1)):
            tasks = np.repeat(np.arange(len(when)), np.diff(offsets))
            chosen = stores == memories[name]
            times.append(when[tasks[chosen]])
            changes.append(sign * amounts[chosen])
        # What is freed at an instant is free for what starts at it.
        time, change = np.concatenate(times), np.concatenate(changes)
        distinct, inverse = np.unique(time, return_inverse=True)
        return distinct, np.cumsum(np.bincount(inverse, change, len(distinct)))

    def peak_bytes(self, name: str) -> float:
        """Largest use of a memory."""
        return float(self.memory_over_time(name)[1].max(initial=0.0))

    def _tracks(self) -> NDArray[np.int32]:
        """First resource of every task, -1 for tasks without one."""
        track = np.full(len(self.start), -1, np.int32)
        tasks = np.repeat(np.arange(len(self.start)), np.diff(self.takes[0]))
        is_resource = np.array([not store.memory for store in self.stores], bool)
        chosen = is_resource[self.takes[1]] if len(self.stores) else np.zeros(0, bool)
        # Written backwards, so that the first resource wins.
        track[tasks[chosen][::-1]] = self.takes[1][chosen][::-1]
        return track

    def to_perfetto(self) -> dict[str, Any]:
        """The schedule as a Chrome trace: one track per resource, one counter per memory, times in microseconds."""
        events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "bitwright"}}]
        tracks = [(index, store.name) for index, store in enumerate(self.stores) if not store.memory]
        for index, name in [*tracks, (len(self.stores), "no resource")]:
            events.append({"ph": "M", "pid": 0, "tid": index, "name": "thread_name", "args": {"name": name}})
        track = np.where(self._tracks() < 0, len(self.stores), self._tracks()).tolist()
        start_us, duration_us = (self.start * 1e6).tolist(), ((self.finish - self.start) * 1e6).tolist()
        for index, name in enumerate(self.names):
            events.append(
                {"ph": "X", "pid": 0, "tid": track[index], "ts": start_us[index], "dur": duration_us[index],
                 "name": name, "cat": self.categories[index] or "task"}
            )  # fmt: skip
        for store in self.stores:
            if store.memory:
                for time, used in zip(*(values.tolist() for values in self.memory_over_time(store.name)), strict=True):
                    events.append({"ph": "C", "pid": 0, "name": store.name, "ts": time * 1e6, "args": {"bytes": used}})
        return {"traceEvents": events, "displayTimeUnit": "ns"}

    def write_trace(self, path: Path) -> None:
        """Write the Chrome trace, which https://ui.perfetto.dev opens."""
        write_whole(path, json.dumps(self.to_perfetto()))

    def gantt(self) -> Any:
        """The schedule as a plotly figure, one row per resource, one colour per category.

        Up to 1,000 tasks are drawn as bars; of more, whose bars would be thinner than a pixel, each row shows the busy
        share of the resource over time.
        """
        import plotly.graph_objects as go

        labels = [store.name for store in self.stores if not store.memory] + ["no resource"]
        row_of = np.full(len(self.stores) + 1, len(labels) - 1)
        row_of[[index for index, store in enumerate(self.stores) if not store.memory]] = np.arange(len(labels) - 1)
        rows = row_of[self._tracks()]  # -1 reads the last entry: no resource
        if not (rows == len(labels) - 1).any():
            labels.pop()
        categories = np.array([name or "task" for name in self.categories], dtype=object)
        figure = go.Figure()
        if len(self.names) > _GANTT_BARS:
            self._draw_shares(figure, rows, categories)
        else:
            for category in dict.fromkeys(categories.tolist()):
                chosen = np.flatnonzero(categories == category)
                figure.add_bar(
                    y=rows[chosen],
                    base=self.start[chosen],
                    x=(self.finish - self.start)[chosen],
                    orientation="h",
                    name=category,
                    text=[self.names[index] for index in chosen.tolist()],
                    textposition="none",
                    hovertemplate="%{text}<br>%{base:.4s}s + %{x:.4s}s<extra></extra>",
                )
            figure.update_layout(barmode="overlay")
        figure.update_xaxes(tickformat="~s", title="time (s)")
        figure.update_yaxes(autorange="reversed", tickvals=list(range(len(labels))), ticktext=labels)
        return figure

    def _draw_shares(self, figure: Any, rows: NDArray[np.intp], categories: NDArray[np.object_]) -> None:
        """Stacked busy shares per time interval and category; a full row is 0.9 high and centred on its number."""
        edges = np.linspace(0, self.makespan, _GANTT_INTERVALS + 1)
        names = list(dict.fromkeys(categories.tolist()))
        colours = dict(zip(names, range(len(names)), strict=True))
        shown = set()
        for row in np.unique(rows):
            capacity = [store.capacity for store in self.stores if not store.memory][row : row + 1] or [1.0]
            height = np.zeros(_GANTT_INTERVALS)
            for category in names:
                chosen = (rows == row) & (categories == category)
                if not chosen.any():
                    continue
                share = 0.9 * self._busy(chosen, edges) / (np.diff(edges) * capacity[0])
                figure.add_bar(
                    x=(edges[:-1] + edges[1:]) / 2,
                    y=-share,  # the axis points down
                    base=row + 0.45 - height,
                    width=edges[1],
                    name=category,
                    legendgroup=category,
                    showlegend=category not in shown,
                    marker={"color": _COLOURS[colours[category] % len(_COLOURS)], "line": {"width": 0}},
                    customdata=share / 0.9,
                    hovertemplate=category + ": busy %{customdata:.0%} at %{x:.4s}s<extra></extra>",
                )
                height += share
                shown.add(category)
        figure.update_layout(barmode="overlay", bargap=0)

    def _busy(self, chosen: NDArray[np.bool_], edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """Task-seconds of the chosen tasks between successive edges."""
        times = np.concatenate([self.start[chosen], self.finish[chosen]])
        slopes = np.concatenate([np.ones(int(chosen.sum())), -np.ones(int(chosen.sum()))])
        order = np.argsort(times, kind="stable")
        times, running = times[order], np.cumsum(slopes[order])
        done = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times))])
        return np.diff(np.interp(edges, times, done))
