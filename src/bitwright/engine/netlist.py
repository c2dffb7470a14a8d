"""A mapped netlist: cells of a library and the nets that connect them, flat, as arrays; and its simulation.

Read from the JSON that Yosys writes; modules instantiated in it (processing elements in an array) are flattened here,
so that a large array costs synthesis of its element only. Net 0 is constant zero, net 1 constant one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitwright import _native
from bitwright.core.errors import BitwrightError, InputError
from bitwright.engine.liberty import Cell, Library

_MAX_INPUTS = 6
_INVERTER = 0b01


@dataclass(frozen=True)
class Port:
    """A port of the top module: `nets` from the least significant bit up."""

    name: str
    direction: str
    nets: NDArray[np.int32]


@dataclass(frozen=True)
class Netlist:
    """Cells grouped by type: `instances[type]` has shape (cells of that type, pins), net indices in pin order.

    An unconnected pin has net -1.
    """

    top: str
    library: Library
    nets: int
    ports: Mapping[str, Port]
    instances: Mapping[str, NDArray[np.int32]]
    modules: Mapping[str, int]  # instances of each flattened module

    def cell(self, name: str) -> Cell:
        """The library cell of a type."""
        return self.library.cell(name)

    @property
    def cells(self) -> dict[str, int]:
        """Number of cells of each type."""
        return {name: len(pins) for name, pins in self.instances.items()}

    @property
    def area_um2(self) -> float:
        """Total cell area."""
        return sum(count * self.cell(name).area_um2 for name, count in self.cells.items())

    @cached_property
    def load_f(self) -> NDArray[np.float64]:
        """Capacitance of the input pins on every net, (nets,). Wires add nothing: this is before placement."""
        load = np.zeros(self.nets)
        for name, pins in self.instances.items():
            cell = self.cell(name)
            for column, pin in enumerate(cell.pins.values()):
                if pin.direction == "input":
                    np.add.at(load, pins[:, column][pins[:, column] >= 0], pin.capacitance_f)
        return load


@dataclass(frozen=True)
class Simulation:
    """`outputs[port]` has shape (cycles, runs); `toggles` counts the transitions of every net over all runs."""

    outputs: Mapping[str, NDArray[np.int64]]
    toggles: NDArray[np.int64]
    cycles: int
    runs: int


def read_netlist(text: str, top: str, library: Library) -> Netlist:
    """Read a mapped netlist from Yosys JSON.

    Raises BitwrightError for cells that are neither in the library nor modules of the file (unmapped logic).
    """
    modules = json.loads(text)["modules"]
    if top not in modules:
        raise BitwrightError(f"The netlist has no module {top!r}; it has {', '.join(modules)}.")
    known: dict[str, Netlist] = {}
    return _flatten(modules, top, library, known)


def _flatten(modules: Mapping[str, Any], top: str, library: Library, known: dict[str, Netlist]) -> Netlist:
    if top in known:
        return known[top]
    module = modules[top]
    index: dict[int | str, int] = {"0": 0, "1": 1, "x": 0}

    def net(bit: int | str) -> int:
        return index.setdefault(bit, len(index) - 1)

    ports = {
        name: Port(name, port["direction"], np.array([net(bit) for bit in port["bits"]], np.int32))
        for name, port in module["ports"].items()
    }
    library_cells = set(library.cell_names)
    rows: dict[str, list[list[int]]] = {}
    children: dict[str, list[Mapping[str, Sequence[int | str]]]] = {}
    for name, cell in module["cells"].items():
        kind = cell["type"]
        if kind in library_cells:
            connections = cell["connections"]
            pins = [net(connections[pin][0]) if connections.get(pin) else -1 for pin in library.cell(kind).pins]
            rows.setdefault(kind, []).append(pins)
        elif kind in modules:
            children.setdefault(kind, []).append(cell["connections"])
        elif kind != "$scopeinfo":
            raise BitwrightError(
                f"Cell {name!r} of module {top!r} has type {kind!r}, which library {library.name} does not have: "
                "this logic was not mapped. Use a library with more functions, or check the memories in the source."
            )
    parts: dict[str, list[NDArray[np.int32]]] = {
        kind: [np.array(pins, np.int32).reshape(len(pins), -1)] for kind, pins in rows.items()
    }
    instantiated: dict[str, int] = {}
    for kind, connections_of in children.items():
        child = _flatten(modules, kind, library, known)
        instantiated[kind] = instantiated.get(kind, 0) + len(connections_of)
        for inner, count in child.modules.items():
            instantiated[inner] = instantiated.get(inner, 0) + count * len(connections_of)
        for connections in connections_of:
            renumber = np.full(child.nets + 1, -2, np.int32)  # the last entry is the unconnected pin, index -1
            renumber[[0, 1, child.nets]] = (0, 1, -1)
            for port in child.ports.values():
                outer = [net(bit) for bit in connections.get(port.name, [])]
                if len(outer) != len(port.nets):
                    continue
                if port.direction == "output" and (renumber[port.nets] != -2).any():
                    raise BitwrightError(
                        f"Output {port.name!r} of module {kind!r} is a constant or wired to another port; "
                        "put a gate or register between them."
                    )
                renumber[port.nets] = outer
            inside = np.flatnonzero(renumber == -2)
            base = len(index) - 1
            renumber[inside] = base + np.arange(len(inside), dtype=np.int32)
            index.update({f"{kind}:{base + offset}": base + offset for offset in range(len(inside))})
            for cell_kind, pins in child.instances.items():
                parts.setdefault(cell_kind, []).append(renumber[pins])
    instances = {kind: np.concatenate(pieces) for kind, pieces in parts.items()}
    known[top] = Netlist(top, library, len(index) - 1, ports, instances, instantiated)
    return known[top]


@dataclass(frozen=True)
class _Program:
    """Gates in topological order, and flip-flops."""

    tables: NDArray[np.uint64]
    inputs: NDArray[np.int32]
    outputs: NDArray[np.int32]
    flop_data: NDArray[np.int32]
    flop_outputs: NDArray[np.int32]


def _program(netlist: Netlist) -> _Program:
    tables, inputs, outputs = [], [], []
    flop_data, flop_outputs = [], []

    def gates(table: int, sources: NDArray[np.int32], result: NDArray[np.int32]) -> None:
        used = result >= 0
        padded = np.full((int(used.sum()), _MAX_INPUTS), -1, np.int32)
        padded[:, : sources.shape[1]] = sources[used]
        tables.append(np.full(len(padded), table, np.uint64))
        inputs.append(padded)
        outputs.append(result[used])

    constant = np.empty((1, 0), np.int32)
    gates(0, constant, np.array([0], np.int32))
    gates(1, constant, np.array([1], np.int32))
    spare = netlist.nets  # states whose true output is not connected get nets of their own
    for kind, pins in netlist.instances.items():
        cell = netlist.cell(kind)
        column = {pin: index for index, pin in enumerate(cell.pins)}
        if cell.flip_flop is None:
            sources = pins[:, [column[pin] for pin in cell.inputs]]
            if (sources < 0).any():
                raise BitwrightError(f"A {kind} of module {netlist.top!r} has an unconnected input.")
            for pin in cell.outputs:
                gates(cell.truth_table(pin), sources, pins[:, column[pin]])
            continue
        flip_flop = cell.flip_flop
        if flip_flop.clear is not None or flip_flop.preset is not None or flip_flop.next_state.operator != "var":
            raise BitwrightError(f"{kind} is not a plain flip-flop; its simulation is not supported.")
        state = np.arange(spare, spare + len(pins), dtype=np.int32)
        spare += len(pins)
        flop_data.append(pins[:, column[flip_flop.next_state.name]])
        flop_outputs.append(state)
        for pin in cell.outputs:
            function = cell.pins[pin].function
            inverted = function is not None and (function.operator == "not") != (
                flip_flop.state_inverse in function.variables()
            )
            gates(_INVERTER if inverted else 0b10, state[:, None], pins[:, column[pin]])
    gate_inputs, gate_outputs = np.concatenate(inputs), np.concatenate(outputs)
    order = np.argsort(_levels(gate_inputs, gate_outputs, spare, netlist.top), kind="stable")
    none = np.empty(0, np.int32)
    return _Program(
        np.concatenate(tables)[order],
        np.ascontiguousarray(gate_inputs[order]),
        np.ascontiguousarray(gate_outputs[order]),
        np.concatenate(flop_data) if flop_data else none,
        np.concatenate(flop_outputs) if flop_outputs else none,
    )


def _levels(inputs: NDArray[np.int32], outputs: NDArray[np.int32], nets: int, top: str) -> NDArray[np.int32]:
    """Logic depth of every gate; each sweep settles one more level."""
    depth = np.zeros(nets + 1, np.int32)  # index -1 (no input) reads the last entry, which stays zero
    level = np.zeros(len(outputs), np.int32)
    for _ in range(len(outputs) + 1):
        new = depth[inputs].max(axis=1) + 1
        if np.array_equal(new, level):
            return level
        level = new
        depth[outputs] = level
    raise BitwrightError(f"Module {top!r} has a combinational loop.")


def simulate(netlist: Netlist, stimulus: Mapping[str, ArrayLike], observe: Sequence[str]) -> Simulation:
    """Simulate a netlist cycle by cycle, without delays (so glitches are not seen), for many runs at once.

    `stimulus[port]` has shape (cycles, runs), integers whose low bits drive the port; ports not named are zero. All
    state starts at zero. Outputs are sampled before the clock edge that ends a cycle, and read as unsigned integers.
    Raises InputError for unknown ports and arrays of different shapes.
    """
    arrays = {name: np.atleast_2d(np.asarray(values, np.int64)) for name, values in stimulus.items()}
    shapes = {values.shape for values in arrays.values()}
    if len(shapes) != 1:
        raise InputError(f"Every stimulus must have the same shape (cycles, runs); given: {sorted(shapes)}.")
    for name in (*arrays, *observe):
        if name not in netlist.ports:
            raise InputError(f"Module {netlist.top!r} has no port {name!r}; it has {', '.join(netlist.ports)}.")
    cycles, runs = shapes.pop()
    program = _program(netlist)
    driven = [(name, bit) for name in arrays for bit in range(len(netlist.ports[name].nets))]
    stimulus_nets = np.array([netlist.ports[name].nets[bit] for name, bit in driven], np.int32)
    words = -(-runs // 64)
    packed = np.zeros((cycles, len(driven), words * 64), np.uint8)
    for row, (name, bit) in enumerate(driven):
        packed[:, row, :runs] = arrays[name] >> bit & 1
    drive = np.packbits(packed, axis=2, bitorder="little").view(np.uint64)
    observed_nets = np.concatenate([netlist.ports[name].nets for name in observe] or [np.empty(0, np.int32)])
    seen = np.zeros((cycles, len(observed_nets), words), np.uint64)
    mask = np.packbits(np.arange(words * 64) < runs, bitorder="little").view(np.uint64)
    toggles = np.zeros(netlist.nets + len(program.flop_outputs), np.int64)
    _native.simulate_gates(
        program.tables, program.inputs, program.outputs, program.flop_data, program.flop_outputs,
        stimulus_nets, np.ascontiguousarray(drive), observed_nets.astype(np.int32), seen, mask, toggles,
    )  # fmt: skip
    bits = np.unpackbits(seen.view(np.uint8), axis=2, bitorder="little")[:, :, :runs].astype(np.int64)
    outputs = {}
    at = 0
    for name in observe:
        width = len(netlist.ports[name].nets)
        weights = (np.int64(1) << np.arange(width, dtype=np.int64))[None, :, None]
        outputs[name] = (bits[:, at : at + width] * weights).sum(axis=1)
        at += width
    return Simulation(outputs, toggles[: netlist.nets], cycles, runs)
