"""Static timing of a mapped netlist with table look-up (NLDM) delays.

Graph-based: for every net the latest rise and fall arrivals and, separately, the largest transition times, as sign-off
tools do. The clock is ideal (no skew, zero transition), input ports switch at time zero with zero transition, wires
have no capacitance or delay (before placement). Tables are interpolated linearly on both axes and extrapolated beyond
their ends. Rise is index 0, fall is index 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.engine.liberty import Arc, Table
from bitwright.engine.netlist import CONSTANT_NETS, CellGroup, IntArray, Netlist, clock_pin

FloatArray = NDArray[np.float64]
_EDGES = (("cell_rise", "rise_transition"), ("cell_fall", "fall_transition"))
_FROM_REGISTERS, _FROM_INPUTS = 0, 1
OUTPUT_LOAD_INVERTERS = 2.0  # 0.02 pF for the OSU 180 nm cells, the load sheet-level comparisons were made with


@dataclass(frozen=True)
class PathStep:
    """One step of a path: the instance, its cell, the output edge (`rise` or `fall`), arrival at its output (s)."""

    instance: str
    cell: str
    edge: str
    arrival_s: float


@dataclass(frozen=True)
class TimingReport:
    """Longest delays (s) by kind of path, set-up times included; None where there is no such path.

    `net_transitions_s` is (2, nets), `net_loads_f` (nets,).
    """

    register_to_register_s: float | None
    input_to_register_s: float | None
    register_to_output_s: float | None
    input_to_output_s: float | None
    critical_path: tuple[PathStep, ...]
    net_transitions_s: FloatArray
    net_loads_f: FloatArray

    @property
    def period_s(self) -> float:
        """Smallest clock period of the register-to-register paths. Raises InputError when there are none."""
        if self.register_to_register_s is None:
            raise InputError("The netlist has no path from a register to a register, so it has no clock period.")
        return self.register_to_register_s


class TableStack:
    """Tables of any size in one padded array, looked up many at a time."""

    def __init__(self, tables: Sequence[Table]) -> None:
        rows = max((table.first.size for table in tables), default=1)
        columns = max((table.second.size for table in tables), default=1)
        self._first = np.full((len(tables), rows), np.inf)
        self._second = np.full((len(tables), columns), np.inf)
        self._values = np.zeros((len(tables), rows, columns))
        self._rows = np.array([table.first.size for table in tables], np.int64)
        self._columns = np.array([table.second.size for table in tables], np.int64)
        for i, table in enumerate(tables):
            self._first[i, : table.first.size] = table.first
            self._second[i, : table.second.size] = table.second
            self._values[i, : table.first.size, : table.second.size] = table.values

    def look_up(self, tables: IntArray, first: FloatArray, second: FloatArray) -> FloatArray:
        """Value of table `tables[i]` at (`first[i]`, `second[i]`), (n,)."""
        row, row_part = _place(self._first[tables], self._rows[tables], first)
        column, column_part = _place(self._second[tables], self._columns[tables], second)
        next_row = np.minimum(row + 1, self._rows[tables] - 1)
        next_column = np.minimum(column + 1, self._columns[tables] - 1)
        values = self._values
        low = values[tables, row, column] * (1 - column_part) + values[tables, row, next_column] * column_part
        high = (
            values[tables, next_row, column] * (1 - column_part) + values[tables, next_row, next_column] * column_part
        )
        result: FloatArray = low * (1 - row_part) + high * row_part
        return result


def _place(axes: FloatArray, sizes: IntArray, at: FloatArray) -> tuple[IntArray, FloatArray]:
    index = np.clip((axes <= at[:, None]).sum(1) - 1, 0, np.maximum(sizes - 2, 0))
    lines = np.arange(len(sizes))
    low = axes[lines, index]
    high = axes[lines, np.minimum(index + 1, sizes - 1)]
    span = high - low
    part: FloatArray = np.where(span > 0, (at - low) / np.where(span > 0, span, 1.0), 0.0)
    return index, part


@dataclass(frozen=True)
class _Edges:
    """Timing edges of one level as parallel arrays; `owner` counts instances over the level's (group, rows)."""

    source: IntArray
    target: IntArray
    in_edge: IntArray
    out_edge: IntArray
    delay: IntArray
    transition: IntArray
    owner: IntArray


class _Tables:
    """Numbers the tables met, each once."""

    def __init__(self) -> None:
        self.tables: list[Table] = []
        self._numbers: dict[int, int] = {}

    def number(self, table: Table) -> int:
        if id(table) not in self._numbers:
            self._numbers[id(table)] = len(self.tables)
            self.tables.append(table)
        return self._numbers[id(table)]


def default_output_load_f(netlist: Netlist) -> float:
    """Load on an output port: two inputs of the library's smallest inverter."""
    return OUTPUT_LOAD_INVERTERS * netlist.library.unit_load_f


def analyse_timing(netlist: Netlist, output_load_f: float | None = None) -> TimingReport:
    """Static timing of `netlist`, with `output_load_f` on every output port (default `default_output_load_f`).

    Raises InputError when the netlist has no paths at all, several clocks, a loop, or a cell without timing.
    """
    loads = netlist.net_loads_f(default_output_load_f(netlist) if output_load_f is None else output_load_f)
    numbering = _Tables()
    launch = _launch_edges(netlist, numbering)
    levels = [_level_edges(netlist, level, numbering) for level in netlist.levels]
    setup = _setup_edges(netlist, numbering)
    stack = TableStack(numbering.tables)
    arrival = np.full((2, 2, netlist.net_count), -np.inf)  # (origin, edge, net)
    transition = np.zeros((2, netlist.net_count))
    inputs = netlist.nets_of_ports("input")
    box_nets = [nets[nets >= CONSTANT_NETS] for box in netlist.boxes for nets in box.nets.values()]
    starts = np.concatenate([inputs, *box_nets]) if box_nets else inputs
    driven_here = np.zeros(netlist.net_count, bool)
    for group in netlist.groups:
        for pin in netlist.library.cell(group.cell).outputs:
            driven_here[group.column(pin)[group.column(pin) >= 0]] = True
    arrival[_FROM_INPUTS][:, starts[~driven_here[starts]]] = 0.0
    if netlist.clock is not None:
        arrival[:, :, netlist.clock] = -np.inf
    if launch.target.size:
        zero = np.zeros(launch.target.size)
        delays = stack.look_up(launch.delay, zero, loads[launch.target])
        slews = stack.look_up(launch.transition, zero, loads[launch.target])
        np.maximum.at(arrival[_FROM_REGISTERS], (launch.out_edge, launch.target), delays)
        np.maximum.at(transition, (launch.out_edge, launch.target), slews)
    level_delays: list[FloatArray] = []
    for edges in levels:
        slews_in = transition[edges.in_edge, edges.source]
        delays = stack.look_up(edges.delay, slews_in, loads[edges.target])
        slews = stack.look_up(edges.transition, slews_in, loads[edges.target])
        reached = np.isfinite(arrival[:, edges.in_edge, edges.source]).any(0)
        for origin in (_FROM_REGISTERS, _FROM_INPUTS):
            np.maximum.at(arrival[origin], (edges.out_edge, edges.target),
                          arrival[origin, edges.in_edge, edges.source] + delays)  # fmt: skip
        np.maximum.at(transition, (edges.out_edge, edges.target), np.where(reached, slews, 0.0))
        level_delays.append(delays)
    setup_s = stack.look_up(setup.delay, transition[setup.in_edge, setup.source], np.zeros(setup.source.size))
    at_registers = arrival[:, setup.in_edge, setup.source] + setup_s  # (origin, set-up edges)
    ends = [netlist.nets_of_ports("output"), *(nets[driven_here[nets]] for nets in box_nets)]
    at_outputs = arrival[:, :, np.unique(np.concatenate(ends))]
    longest = [_longest(at_registers[0]), _longest(at_registers[1]), _longest(at_outputs[0]), _longest(at_outputs[1])]
    if all(value is None for value in longest):
        raise InputError(f"{netlist.top} has no timing paths: nothing leads from an input or register to another.")
    path: tuple[PathStep, ...] = ()
    if longest[0] is not None:
        end = int(np.argmax(at_registers[0]))
        path = _trace(netlist, launch, levels, level_delays, arrival[_FROM_REGISTERS],
                      int(setup.source[end]), int(setup.in_edge[end]))  # fmt: skip
    return TimingReport(longest[0], longest[1], longest[2], longest[3], path, transition, loads)


def _longest(arrivals: FloatArray) -> float | None:
    value = float(arrivals.max(initial=-np.inf))
    return value if np.isfinite(value) else None


def _concatenate(parts: list[tuple[IntArray, ...]]) -> _Edges:
    empty = [np.zeros(0, np.int64)] * 7
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else empty
    return _Edges(*columns)


def _edge_pairs(sense: str) -> tuple[tuple[int, int], ...]:
    if sense == "positive_unate":
        return ((0, 0), (1, 1))
    if sense == "negative_unate":
        return ((0, 1), (1, 0))
    return ((0, 0), (0, 1), (1, 0), (1, 1))


def _level_edges(netlist: Netlist, level: Sequence[tuple[CellGroup, IntArray]], numbering: _Tables) -> _Edges:
    parts, first_owner = [], 0
    for group, rows in level:
        cell = netlist.library.cell(group.cell)
        owners = first_owner + np.arange(rows.size)
        first_owner += rows.size
        for output in cell.outputs:
            targets = group.column(output)[rows]
            arcs = [
                arc for arc in cell.pins[output].arcs if arc.kind == "combinational" and arc.related_pin in cell.pins
            ]
            if not arcs:
                raise InputError(f"Library {netlist.library.name}: cell {group.cell!r} has no timing for {output!r}.")
            kept = targets >= 0
            for arc in arcs:
                sources = group.column(arc.related_pin)[rows]
                parts += _arc_edges(arc, sources[kept], targets[kept], owners[kept], _edge_pairs(arc.sense), numbering)
    return _concatenate(parts)


def _arc_edges(
    arc: Arc,
    sources: IntArray,
    targets: IntArray,
    owners: IntArray,
    pairs: Sequence[tuple[int, int]],
    numbering: _Tables,
) -> list[tuple[IntArray, ...]]:
    parts = []
    for in_edge, out_edge in pairs:
        delay, transition = _EDGES[out_edge]
        if delay not in arc.tables or transition not in arc.tables:
            continue
        numbers = (in_edge, out_edge, numbering.number(arc.tables[delay]), numbering.number(arc.tables[transition]))
        parts.append((sources, targets, *(np.full(sources.size, number) for number in numbers), owners))
    return parts


def _launch_edges(netlist: Netlist, numbering: _Tables) -> _Edges:
    parts, first_owner = [], 0
    for group in netlist.flip_flops:
        cell = netlist.library.cell(group.cell)
        owners = first_owner + np.arange(len(group.names))
        first_owner += len(group.names)
        for output in cell.outputs:
            targets = group.column(output)
            kept = targets >= 0
            arcs = [arc for arc in cell.pins[output].arcs if arc.kind == "rising_edge"]
            if not arcs:
                raise InputError(
                    f"Library {netlist.library.name}: flip-flop {group.cell!r} has no clock-to-output timing."
                )
            for arc in arcs:
                sources = group.column(clock_pin(cell))
                parts += _arc_edges(arc, sources[kept], targets[kept], owners[kept], ((0, 0), (0, 1)), numbering)
    return _concatenate(parts)


def _setup_edges(netlist: Netlist, numbering: _Tables) -> _Edges:
    parts = []
    for group in netlist.flip_flops:
        cell = netlist.library.cell(group.cell)
        owners = np.arange(len(group.names))
        for pin in cell.inputs:
            if pin == clock_pin(cell):
                continue
            arcs = [arc for arc in cell.pins[pin].arcs if arc.kind == "setup_rising"]
            if not arcs:
                raise InputError(f"Library {netlist.library.name}: {group.cell!r} has no set-up time for pin {pin!r}.")
            for arc in arcs:
                for edge, table in enumerate(("rise_constraint", "fall_constraint")):
                    if table in arc.tables:
                        numbers = (edge, edge, numbering.number(arc.tables[table]), 0)
                        nets = group.column(pin)
                        parts.append((nets, nets, *(np.full(nets.size, number) for number in numbers), owners))
    return _concatenate(parts)


def _trace(
    netlist: Netlist,
    launch: _Edges,
    levels: list[_Edges],
    delays: list[FloatArray],
    arrival: FloatArray,
    net: int,
    edge: int,
) -> tuple[PathStep, ...]:
    names = [[(group.names[int(row)], group.cell) for group, rows in level for row in rows] for level in netlist.levels]
    flops = [(name, group.cell) for group in netlist.flip_flops for name in group.names]
    steps = []
    for edges, delay, owners in zip(reversed(levels), reversed(delays), reversed(names), strict=True):
        into = np.flatnonzero((edges.target == net) & (edges.out_edge == edge))
        if not into.size:
            continue
        best = into[np.argmax(arrival[edges.in_edge[into], edges.source[into]] + delay[into])]
        steps.append(PathStep(*owners[int(edges.owner[best])], ("rise", "fall")[edge], float(arrival[edge, net])))
        net, edge = int(edges.source[best]), int(edges.in_edge[best])
    start = np.flatnonzero((launch.target == net) & (launch.out_edge == edge))
    if start.size:
        steps.append(PathStep(*flops[int(launch.owner[start[0]])], ("rise", "fall")[edge], float(arrival[edge, net])))
    return tuple(reversed(steps))
