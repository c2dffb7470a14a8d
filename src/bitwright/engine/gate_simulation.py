"""Cycle-exact simulation of a mapped netlist on many operand streams at once, with toggle counts.

Zero delay: every net takes its settled value once per cycle, so glitches are not counted. 64 streams share a machine
word (native kernel `simulate_gates`). Flip-flops start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.engine.boolean import truth_table
from bitwright.engine.liberty import Cell
from bitwright.engine.netlist import CONSTANT_NETS, Netlist, clock_pin

MAXIMUM_INPUTS = 6


@dataclass(frozen=True)
class Simulation:
    """`outputs` by port as unsigned numbers, (cycles, streams); `toggles` (nets,), summed over streams and over the
    `intervals` between successive cycles (the settling of the first cycle is not counted)."""

    outputs: Mapping[str, NDArray[np.uint64]]
    toggles: NDArray[np.int64]
    intervals: int

    def signed_output(self, port: str, bits: int) -> NDArray[np.int64]:
        """Output `port` of `bits` bits read as two's complement, (cycles, streams)."""
        shift = np.uint64(64 - bits)
        return (self.outputs[port] << shift).view(np.int64) >> np.int64(64 - bits)


def simulate(netlist: Netlist, inputs: Mapping[str, NDArray[np.integer]]) -> Simulation:
    """Drive every input port but the clock with integers (cycles, streams), two's complement, up to 64 bits wide.

    Raises InputError for a missing or unknown port, another shape, or a cell the simulator cannot express.
    """
    from bitwright._native import simulate_gates

    if netlist.boxes:
        raise InputError(f"{netlist.top} contains the module {netlist.boxes[0].module!r} as a box; join it first.")
    ports = {name: port.nets for name, port in netlist.ports.items() if port.direction == "input"}
    ports = {name: nets for name, nets in ports.items() if netlist.clock is None or netlist.clock not in nets}
    if set(inputs) != set(ports):
        raise InputError(f"{netlist.top} has the inputs {', '.join(sorted(ports))}; given {', '.join(sorted(inputs))}.")
    shapes = {np.shape(values) for values in inputs.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        raise InputError(f"Every input needs the same shape (cycles, streams), none empty; given {sorted(shapes)}.")
    cycles, streams = next(iter(shapes))
    words = -(-streams // 64)
    tables, gate_inputs, gate_outputs = _gates(netlist)
    data, state = _flip_flops(netlist)
    driven = [(nets, np.asarray(inputs[name])) for name, nets in ports.items()]
    stimulus_nets = np.concatenate([nets for nets, _ in driven]) if driven else np.zeros(0, np.int64)
    stimulus = np.zeros((cycles, stimulus_nets.size, words), np.uint64)
    at = 0
    for nets, values in driven:
        stimulus[:, at : at + nets.size] = _pack(values, nets.size, words)
        at += nets.size
    outputs = {name: port.nets for name, port in netlist.ports.items() if port.direction == "output"}
    observed_nets = np.concatenate(list(outputs.values())) if outputs else np.zeros(0, np.int64)
    observed = np.zeros((cycles, observed_nets.size, words), np.uint64)
    mask = _pack(np.full((1, streams), 1, np.int64), 1, words)[0, 0]
    toggles = np.zeros(netlist.net_count, np.int64)
    simulate_gates(tables, gate_inputs, gate_outputs, data, state, stimulus_nets.astype(np.int32), stimulus,
                   observed_nets.astype(np.int32), observed, np.ascontiguousarray(mask), toggles)  # fmt: skip
    found, at = {}, 0
    for name, nets in outputs.items():
        found[name] = _unpack(observed[:, at : at + nets.size], streams)
        at += nets.size
    return Simulation(found, toggles, (cycles - 1) * streams)


def _gates(netlist: Netlist) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]:
    """Truth tables, inputs and outputs of all gates in topological order; the constants come first."""
    tables = [np.array([0, 1], np.uint64)]
    inputs = [np.full((CONSTANT_NETS, MAXIMUM_INPUTS), -1, np.int64)]
    outputs = [np.arange(CONSTANT_NETS)]
    for level in netlist.levels:
        for group, rows in level:
            cell = netlist.library.cell(group.cell)
            for output in cell.outputs:
                kept = rows[group.column(output)[rows] >= 0]
                table, pins = _table(cell, output)
                block = np.full((kept.size, MAXIMUM_INPUTS), -1, np.int64)
                for column, pin in enumerate(pins):
                    block[:, column] = group.column(pin)[kept]
                tables.append(np.full(kept.size, table, np.uint64))
                inputs.append(block)
                outputs.append(group.column(output)[kept])
    return np.concatenate(tables), np.concatenate(inputs).astype(np.int32), np.concatenate(outputs).astype(np.int32)


def _table(cell: Cell, output: str) -> tuple[int, tuple[str, ...]]:
    function = cell.pins[output].function
    if function is None:
        raise InputError(f"Output {output!r} of cell {cell.name!r} has no function, so it cannot be simulated.")
    pins = function.variables()
    if len(pins) > MAXIMUM_INPUTS:
        raise InputError(f"Cell {cell.name!r} has {len(pins)} inputs; the simulator takes up to {MAXIMUM_INPUTS}.")
    return truth_table(function, pins), pins


def _flip_flops(netlist: Netlist) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    data, state = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for group in netlist.flip_flops:
        cell = netlist.library.cell(group.cell)
        flip_flop = cell.flip_flop
        assert flip_flop is not None
        clock_pin(cell)
        if flip_flop.next_state.operator != "var" or flip_flop.clear is not None or flip_flop.preset is not None:
            raise InputError(f"Flip-flop {cell.name!r} has set, reset, scan or enable; the simulator takes plain ones.")
        for output in cell.outputs:
            nets = group.column(output)
            used = nets >= 0
            function = cell.pins[output].function
            if function is None or function.operator != "var" or function.name != flip_flop.state:
                if used.any():
                    raise InputError(
                        f"The simulator takes flip-flops with a true output only, not {cell.name}.{output}."
                    )
                continue
            data.append(group.column(flip_flop.next_state.name)[used])
            state.append(nets[used])
    return np.concatenate(data).astype(np.int32), np.concatenate(state).astype(np.int32)


def _pack(values: NDArray[np.integer], bits: int, words: int) -> NDArray[np.uint64]:
    """(cycles, streams) integers to (cycles, bits, words) lane words."""
    if bits > 64:
        raise InputError(f"A port of {bits} bits cannot be driven with integers; up to 64 bits are possible.")
    raw = np.asarray(values).astype(np.int64 if np.asarray(values).dtype.kind != "u" else np.uint64).view(np.uint64)
    lanes = np.zeros((raw.shape[0], bits, words * 64), np.uint8)
    for bit in range(bits):
        lanes[:, bit, : raw.shape[1]] = (raw >> np.uint64(bit)) & np.uint64(1)
    packed: NDArray[np.uint64] = np.packbits(lanes, axis=-1, bitorder="little").view("<u8").astype(np.uint64)
    return packed


def _unpack(lanes: NDArray[np.uint64], streams: int) -> NDArray[np.uint64]:
    """(cycles, bits, words) lane words to (cycles, streams) integers."""
    bits = np.unpackbits(np.ascontiguousarray(lanes).astype("<u8").view(np.uint8), axis=-1, bitorder="little")
    values = np.zeros((lanes.shape[0], streams), np.uint64)
    if lanes.shape[1] > 64:
        raise InputError(f"A port of {lanes.shape[1]} bits cannot be read as integers; up to 64 bits are possible.")
    for bit in range(lanes.shape[1]):
        values |= bits[:, bit, :streams].astype(np.uint64) << np.uint64(bit)
    return values
