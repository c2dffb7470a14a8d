"""Netlists of library cells: read from Yosys JSON, put in topological order, joined across a hierarchy.

A netlist keeps one integer matrix per cell type (instances by pins, holding net numbers), so that the interpreters of
a netlist (timing, simulation, power) work on whole arrays. Net 0 is the constant zero, net 1 the constant one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import BitwrightError, InputError
from bitwright.engine.liberty import Cell, Library

IntArray = NDArray[np.int64]
CONSTANT_NETS = 2


@dataclass(frozen=True)
class CellGroup:
    """All instances of one cell type: `nets` (instances, pins) holds net numbers, -1 where a pin is open."""

    cell: str
    pins: tuple[str, ...]
    names: tuple[str, ...]
    nets: IntArray

    def column(self, pin: str) -> IntArray:
        """Nets of one pin, (instances,)."""
        column: IntArray = self.nets[:, self.pins.index(pin)]
        return column


@dataclass(frozen=True)
class Box:
    """An instance of a module that is not described here; `nets` by port, least significant bit first."""

    module: str
    name: str
    nets: Mapping[str, IntArray]


@dataclass(frozen=True)
class Port:
    """A port of the netlist: its direction and its nets, least significant bit first."""

    direction: str
    nets: IntArray


@dataclass(frozen=True)
class Netlist:
    """Instances of the cells of one library. Build it with `read_netlist` or `join`."""

    top: str
    net_count: int
    ports: Mapping[str, Port]
    groups: tuple[CellGroup, ...]
    boxes: tuple[Box, ...]
    library: Library

    @property
    def cells(self) -> dict[str, int]:
        """Number of instances by cell type."""
        return {group.cell: len(group.names) for group in self.groups}

    def nets_of_ports(self, direction: str) -> IntArray:
        """Net numbers of all ports of a direction, constants left out."""
        found = [port.nets for port in self.ports.values() if port.direction == direction]
        nets = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
        return nets[nets >= CONSTANT_NETS]

    @cached_property
    def flip_flops(self) -> tuple[CellGroup, ...]:
        """The groups of flip-flops."""
        return tuple(group for group in self.groups if self.library.cell(group.cell).flip_flop)

    @cached_property
    def clock(self) -> int | None:
        """The clock's net, None without flip-flops.

        Raises InputError when flip-flops use several clocks, or a clock that is not an input port.
        """
        clocks: dict[int, str] = {}
        for group in self.flip_flops:
            column = group.column(clock_pin(self.library.cell(group.cell)))
            for net, first in zip(*np.unique(column, return_index=True), strict=True):
                clocks.setdefault(int(net), group.names[int(first)])
        if not clocks:
            return None
        if len(clocks) > 1:
            users = ", ".join(repr(name) for name in list(clocks.values())[:2])
            raise InputError(f"{self.top}: flip-flops {users} have different clocks; one clock is supported.")
        net, user = next(iter(clocks.items()))
        if net not in self.nets_of_ports("input"):
            raise InputError(f"{self.top}: the clock of flip-flop {user!r} does not come from an input port.")
        return net

    @cached_property
    def levels(self) -> tuple[tuple[tuple[CellGroup, IntArray], ...], ...]:
        """Combinational instances in topological order: per level, (group, rows) whose inputs are all settled.

        Raises InputError naming an instance when there is a combinational loop or an input nothing drives.
        """
        settled = np.zeros(self.net_count, bool)
        settled[:CONSTANT_NETS] = True
        settled[self.nets_of_ports("input")] = True
        for box in self.boxes:
            for nets in box.nets.values():
                settled[nets[nets >= 0]] = True
        waiting: list[tuple[CellGroup, IntArray, IntArray, IntArray]] = []
        driven = settled.copy()
        for group in self.groups:
            cell = self.library.cell(group.cell)
            outputs = _columns(group, cell.outputs)
            driven[outputs[outputs >= 0]] = True
            if cell.flip_flop:
                settled[outputs[outputs >= 0]] = True
            else:
                waiting.append((group, _columns(group, cell.inputs), outputs, np.arange(len(group.names))))
        for group in self.groups:
            inputs = _columns(group, self.library.cell(group.cell).inputs)
            open_rows = np.flatnonzero((inputs < 0).any(1) | ~driven[inputs].all(1))
            if open_rows.size:
                raise InputError(f"{self.top}: an input of {group.cell} {group.names[open_rows[0]]!r} is not driven.")
        levels = []
        while waiting:
            level, rest = [], []
            for group, inputs, outputs, rows in waiting:
                ready = settled[inputs].all(1)
                if ready.any():
                    level.append((group, rows[ready], outputs[ready]))
                if not ready.all():
                    rest.append((group, inputs[~ready], outputs[~ready], rows[~ready]))
            if not level:
                group, rows = rest[0][0], rest[0][3]
                raise InputError(f"{self.top}: combinational loop through {group.cell} {group.names[rows[0]]!r}.")
            for _, _, outputs in level:
                settled[outputs[outputs >= 0]] = True
            levels.append(tuple((group, rows) for group, rows, _ in level))
            waiting = rest
        return tuple(levels)

    def net_loads_f(self, output_load_f: float) -> NDArray[np.float64]:
        """Capacitance on each net (F): input pins of cells, and `output_load_f` per output port bit or box pin.

        Wires are not counted: there is no placement yet.
        """
        loads = np.zeros(self.net_count)
        for group in self.groups:
            cell = self.library.cell(group.cell)
            for pin in cell.inputs:
                np.add.at(loads, group.column(pin), cell.pins[pin].capacitance_f)
        for port in self.ports.values():
            if port.direction == "output":
                np.add.at(loads, port.nets, output_load_f)
        for box in self.boxes:
            for nets in box.nets.values():
                np.add.at(loads, nets[nets >= 0], output_load_f)
        return loads


def clock_pin(cell: Cell) -> str:
    """The clock pin of a flip-flop that takes its data on the rising edge.

    Raises InputError for any other cell.
    """
    if cell.flip_flop is None or cell.flip_flop.clocked_on.operator != "var":
        raise InputError(f"Cell {cell.name!r} is not a flip-flop clocked on the rising edge of one pin.")
    return cell.flip_flop.clocked_on.name


def _columns(group: CellGroup, pins: Iterable[str]) -> IntArray:
    return group.nets[:, [group.pins.index(pin) for pin in pins]]


def read_netlist(text: str, top: str, library: Library, boxes: Iterable[str] = ()) -> Netlist:
    """Read the module `top` of a netlist in Yosys JSON, mapped to `library`; `boxes` may stay modules.

    Raises InputError when it is not such a netlist, BitwrightError naming the cell when one was left unmapped.
    """
    try:
        modules = json.loads(text)["modules"]
        module = modules[top]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Not a Yosys JSON netlist with a module {top!r}: {error}.") from None
    known, kept_boxes = set(library.cell_names), set(boxes)
    numbers: dict[Any, int] = {"0": 0, "1": 1}

    def nets(bits: list[Any]) -> IntArray:
        for bit in bits:
            if bit in ("x", "z"):
                raise InputError(f"{top}: a connection has the undefined value {bit!r}; run `setundef -zero` first.")
            numbers.setdefault(bit, len(numbers))
        return np.array([numbers[bit] for bit in bits], np.int64)

    ports = {name: Port(port["direction"], nets(port["bits"])) for name, port in module["ports"].items()}
    found: dict[str, list[tuple[str, dict[str, list[Any]]]]] = {}
    kept: list[Box] = []
    for name, instance in module["cells"].items():
        kind = instance["type"]
        if kind in known:
            found.setdefault(kind, []).append((name, instance["connections"]))
        elif kind in kept_boxes:
            kept.append(Box(kind, name, {pin: nets(bits) for pin, bits in instance["connections"].items()}))
        elif kind not in ("$scopeinfo", "$print", "$check"):
            raise BitwrightError(
                f"{top}: cell {name!r} of type {kind!r} was not mapped to library {library.name}. The library has no "
                "cell for it: use plain rising-edge flip-flops and logic, or a library that has one."
            )
    groups = []
    for kind, instances in sorted(found.items()):
        pins = tuple(pin.name for pin in library.cell(kind).pins.values() if pin.direction in ("input", "output"))
        matrix = np.full((len(instances), len(pins)), -1, np.int64)
        for row, (_, connections) in enumerate(instances):
            for column, pin in enumerate(pins):
                if connections.get(pin):
                    matrix[row, column] = nets(connections[pin])[0]
        groups.append(CellGroup(kind, pins, tuple(name for name, _ in instances), matrix))
    return Netlist(top, len(numbers), ports, tuple(groups), tuple(kept), library)


def join(outer: Netlist, inner: Mapping[str, Netlist]) -> Netlist:
    """Replace every box of `outer` whose module is in `inner` by that netlist; instance names become `box/name`.

    Raises InputError when a port has another width than the box, or the libraries differ.
    """
    parts: dict[str, list[CellGroup]] = {}
    for group in outer.groups:
        parts.setdefault(group.cell, []).append(group)
    count, kept = outer.net_count, []
    alias = np.arange(outer.net_count)  # an inner output port may be wired to a constant or straight to an input
    for box in outer.boxes:
        netlist = inner.get(box.module)
        if netlist is None:
            kept.append(box)
            continue
        if netlist.library.digest != outer.library.digest:
            raise InputError(f"{outer.top} and {netlist.top} are mapped to different libraries.")
        mapping = np.full(netlist.net_count, -1, np.int64)
        mapping[:CONSTANT_NETS] = range(CONSTANT_NETS)
        for direction in ("input", "output"):
            for name, port in netlist.ports.items():
                nets = box.nets.get(name, np.full(port.nets.size, -1, np.int64))
                if port.direction != direction:
                    continue
                if nets.size != port.nets.size:
                    raise InputError(f"{outer.top}: port {name!r} of {box.name!r} has {nets.size} bits, {netlist.top} "
                                     f"has {port.nets.size}.")  # fmt: skip
                free = (nets >= 0) & (mapping[port.nets] < 0)
                mapping[port.nets[free]] = nets[free]
                shared = (nets >= CONSTANT_NETS) & (mapping[port.nets] != nets)
                alias[nets[shared]] = mapping[port.nets[shared]]
        new = mapping < 0
        mapping[new] = count + np.arange(np.count_nonzero(new))
        count += int(np.count_nonzero(new))
        for group in netlist.groups:
            matrix = np.where(group.nets >= 0, mapping[group.nets], -1)
            names = tuple(f"{box.name}/{name}" for name in group.names)
            parts.setdefault(group.cell, []).append(CellGroup(group.cell, group.pins, names, matrix))
    full = np.concatenate([alias, np.arange(outer.net_count, count)])
    while not np.array_equal(full, full[full]):
        full = full[full]
    groups = []
    for cell, members in sorted(parts.items()):
        matrix = np.concatenate([member.nets for member in members])
        names = tuple(name for member in members for name in member.names)
        groups.append(CellGroup(cell, members[0].pins, names, np.where(matrix >= 0, full[matrix], -1)))
    ports = {name: Port(port.direction, full[port.nets]) for name, port in outer.ports.items()}
    return Netlist(outer.top, count, ports, tuple(groups), tuple(kept), outer.library)
