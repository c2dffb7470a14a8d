"""Waveforms: what a simulated design is driven with, what it must show in every cycle, and how both compare."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError, UnknownNameError

_NAME = re.compile(r"(?!tb_|dut$|testbench$)[A-Za-z_]\w*")


@dataclass(frozen=True)
class Port:
    """A port and its width in bits."""

    name: str
    bits: int


@dataclass(frozen=True)
class Waveforms:
    """What is driven and what must be seen: port -> value per cycle, (cycles,) int64, signed or unsigned readings.

    `care` says in which cycles an expected value counts, (cycles,) bool; a port without it counts always. `widths`
    holds the width (1 to 64) of every port. Before cycle 0, `reset` is 1 and all other inputs 0 for `reset_cycles`
    cycles; after that it is 0. `clock` and `reset` are "" for a design without that port.

    Raises InputError for lengths that differ, unknown or missing names, and values that do not fit their port.
    """

    inputs: Mapping[str, NDArray[np.int64]]
    expected: Mapping[str, NDArray[np.int64]]
    care: Mapping[str, NDArray[np.bool_]]
    widths: Mapping[str, int]
    reset_cycles: int
    clock: str = "clk"
    reset: str = "rst"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def cycles(self) -> int:
        """Number of cycles after reset."""
        return len(next(iter(self.expected.values())))

    @property
    def driven(self) -> tuple[Port, ...]:
        """The input ports, without clock and reset."""
        return tuple(Port(name, self.widths[name]) for name in self.inputs)

    @property
    def compared(self) -> tuple[Port, ...]:
        """The output ports that are compared."""
        return tuple(Port(name, self.widths[name]) for name in self.expected)


@dataclass(frozen=True)
class SimulationResult:
    """`mismatches` wrong outputs in `cycles` cycles; `first_mismatch` describes the first ("" without one)."""

    simulator: str
    cycles: int
    mismatches: int
    first_mismatch: str

    @property
    def passed(self) -> bool:
        """No output differed in any cycle."""
        return self.mismatches == 0


def _check(waveforms: Waveforms) -> None:
    names = [*waveforms.inputs, *waveforms.expected]
    if not waveforms.expected:
        raise InputError("Waveforms need at least one expected output; nothing would be compared.")
    special = [name for name in (waveforms.clock, waveforms.reset) if name]
    for name in [*names, *special]:
        if not _NAME.fullmatch(name):
            raise InputError(f"Port {name!r} is not a plain Verilog name, or one the testbench uses (dut, tb_...).")
    twice = {name for name in names if [*names, *special].count(name) > 1}
    if twice:
        raise InputError(f"Port {min(twice)!r} is given twice: as input, expected output, clock or reset.")
    lengths = {name: np.shape(values) for part in (waveforms.inputs, waveforms.expected, waveforms.care)
               for name, values in part.items()}  # fmt: skip
    cycles = lengths[next(iter(waveforms.expected))]
    if len(cycles) != 1 or cycles[0] < 1 or set(lengths.values()) != {cycles}:
        raise InputError(f"Every waveform needs the same length (cycles,), at least one; given {lengths}.")
    for name in waveforms.care:
        if name not in waveforms.expected:
            raise UnknownNameError("expected output in `care`", name, waveforms.expected)
    for name in names:
        bits = waveforms.widths.get(name)
        if bits is None:
            raise InputError(f"Port {name!r} has no width; `widths` needs every port.")
        if not 1 <= bits <= 64:
            raise InputError(f"Port {name!r} has {bits} bits; 1 to 64 are possible.")
        values = _counting(waveforms, name)
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if low < -(1 << (bits - 1)) or high >= 1 << bits:
            raise InputError(f"Port {name!r} of {bits} bits cannot hold {low if low < -(1 << (bits - 1)) else high}.")
    if waveforms.reset_cycles < 0:
        raise InputError(f"reset_cycles is {waveforms.reset_cycles}; it must not be negative.")
    if not any(_counting(waveforms, name).size for name in waveforms.expected):
        raise InputError("No expected value counts in any cycle (`care` is never true); nothing would be compared.")


def _counting(waveforms: Waveforms, name: str) -> NDArray[np.int64]:
    """The values of a port that count: all of an input, those with care of an output."""
    if name in waveforms.inputs:
        return np.asarray(waveforms.inputs[name])
    values = np.asarray(waveforms.expected[name])
    return values[waveforms.care[name]] if name in waveforms.care else values


def check_width(port: Port, widths: Mapping[str, int]) -> None:
    """Raise InputError when a design whose ports have `widths` has no such port, or has it in another width."""
    if port.name not in widths:
        raise UnknownNameError("port of the design", port.name, widths)
    if widths[port.name] != port.bits:
        raise InputError(
            f"The waveforms do not fit the design: port {port.name} is {widths[port.name]} bits wide, "
            f"{port.bits} in the waveforms."
        )


def compare(simulator: str, seen: Mapping[str, NDArray[np.uint64]], waveforms: Waveforms) -> SimulationResult:
    """The result for outputs `seen`, (cycles,) each as unsigned numbers, described as the Verilog testbench does."""
    mismatches, first, description = 0, waveforms.cycles, ""
    for port in waveforms.compared:
        mask = np.uint64((1 << port.bits) - 1)
        expected = np.asarray(waveforms.expected[port.name]).astype(np.int64).view(np.uint64) & mask
        wrong = np.flatnonzero((seen[port.name] != expected) & waveforms.care.get(port.name, True))
        mismatches += wrong.size
        if wrong.size and wrong[0] < first:
            first, digits = int(wrong[0]), -(-port.bits // 4)
            values = (int(seen[port.name][first]), int(expected[first]))
            is_, should = (f"{value:0{digits}x}" for value in values)
            description = f"cycle {first}: {port.name} is {is_}, expected {should}"
    return SimulationResult(simulator, waveforms.cycles, mismatches, description)
