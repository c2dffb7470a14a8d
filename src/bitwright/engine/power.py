"""Energy of a mapped netlist: internal energy of the cells, charging of the nets, clock pins, and leakage.

Activity comes from simulating the netlist on real operands, without delays: glitches are not counted, and neither are
the clock tree and the wires, which exist only after placement. A vectorless estimate assumes one activity for every
net; it is a different kind of figure and is never mixed with the other. Nets driven by input ports are charged to what
drives them, outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError
from bitwright.engine.liberty import EnergyArc, Table
from bitwright.engine.netlist import CellGroup, Netlist, clock_pin
from bitwright.engine.timing import TableStack, TimingReport, analyse_timing

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PowerReport:
    """Dynamic energy per clock cycle (J) by group, leakage power (W), at `period_s`.

    A group holds the internal energy of its cells and the charging of the nets they drive; `clock_j` is what the clock
    pins of the flip-flops cost in every cycle, whatever the data does.
    """

    combinational_j: float
    sequential_j: float
    clock_j: float
    leakage_w: float
    period_s: float
    activity: Literal["simulated", "vectorless"]

    @property
    def energy_j_per_cycle(self) -> float:
        """Dynamic energy per cycle, leakage left out."""
        return self.combinational_j + self.sequential_j + self.clock_j

    @property
    def power_w(self) -> float:
        """Dynamic power at the clock period plus leakage."""
        return self.energy_j_per_cycle / self.period_s + self.leakage_w


def activity_power(
    netlist: Netlist,
    toggles: NDArray[np.int64],
    cycles: int,
    period_s: float,
    timing: TimingReport | None = None,
) -> PowerReport:
    """Power from `toggles` (nets,) counted over `cycles` (`Simulation.toggles` and `.intervals`).

    `timing` gives transition times and loads; it is computed when not given. Raises InputError for another number of
    nets, no cycles or a period that is not positive.
    """
    if toggles.shape != (netlist.net_count,):
        raise InputError(f"Toggles of {toggles.shape} do not belong to a netlist of {netlist.net_count} nets.")
    if cycles < 1:
        raise InputError("Power from activity needs toggles of at least one interval: simulate two cycles or more.")
    return _power(netlist, toggles / cycles, period_s, timing, "simulated")


def vectorless_power(
    netlist: Netlist, period_s: float, activity: float = 0.1, timing: TimingReport | None = None
) -> PowerReport:
    """Power when every net except the clock toggles `activity` times a cycle. Raises InputError outside 0..1."""
    if not 0 <= activity <= 1:
        raise InputError(f"The activity is {activity:g}; it must be between 0 and 1 toggles per cycle.")
    return _power(netlist, np.full(netlist.net_count, activity), period_s, timing, "vectorless")


def energy_by_part(
    netlist: Netlist, toggles: NDArray[np.int64], cycles: int, parts: Mapping[str, str], timing: TimingReport
) -> dict[str, float]:
    """Dynamic energy per cycle (J) by part: instances whose name starts with `<box>/` belong to `parts[box]`, the rest
    to "". Otherwise as `activity_power`.
    """
    found: dict[str, float] = {}
    rate = toggles / cycles
    for group, _, energy in _instance_energies(netlist, rate, timing):
        for name, value in zip(group.names, energy.tolist(), strict=True):
            part = parts.get(name.partition("/")[0], "") if "/" in name else ""
            found[part] = found.get(part, 0.0) + value
    return found


def _power(
    netlist: Netlist,
    rate: FloatArray,
    period_s: float,
    timing: TimingReport | None,
    activity: Literal["simulated", "vectorless"],
) -> PowerReport:
    if not period_s > 0:
        raise InputError(f"The clock period is {period_s:g} s; it must be positive.")
    groups = {"combinational": 0.0, "sequential": 0.0, "clock": 0.0}
    for _, kind, energy in _instance_energies(netlist, rate, timing or analyse_timing(netlist)):
        groups[kind] += float(energy.sum())
    leakage_w = sum(netlist.library.cell(group.cell).leakage_w * len(group.names) for group in netlist.groups)
    return PowerReport(groups["combinational"], groups["sequential"], groups["clock"], leakage_w, period_s, activity)


def _instance_energies(
    netlist: Netlist, rate: FloatArray, timing: TimingReport
) -> Iterator[tuple[CellGroup, str, FloatArray]]:
    """Dynamic energy per cycle of the instances of a group, (instances,): combinational, sequential or clock."""
    transitions = timing.net_transitions_s.max(0)
    voltage = netlist.library.voltage_v
    for group in netlist.groups:
        cell = netlist.library.cell(group.cell)
        clock = clock_pin(cell) if cell.flip_flop else None
        switched, clocked = np.zeros(len(group.names)), np.zeros(len(group.names))
        for pin in cell.pins.values():
            if pin.direction not in ("input", "output"):
                continue
            nets = group.column(pin.name)
            rows = np.flatnonzero(nets >= 0)
            nets = nets[rows]
            if pin.name == clock:  # two edges of the ideal clock in every cycle
                own = _energy_j(pin.energy, group, rows, transitions, np.zeros(nets.size), nets)
                clocked[rows] += 2 * own + pin.capacitance_f * voltage**2
                continue
            loads = timing.net_loads_f[nets] if pin.direction == "output" else np.zeros(nets.size)
            energy = _energy_j(pin.energy, group, rows, transitions, loads, nets)
            if pin.direction == "output":
                energy = energy + 0.5 * loads * voltage**2
            switched[rows] += rate[nets] * energy
        yield group, "sequential" if cell.flip_flop else "combinational", switched
        if clock:
            yield group, "clock", clocked


def _energy_j(
    arcs: tuple[EnergyArc, ...], group: CellGroup, rows: NDArray[np.int64], transitions: FloatArray, loads: FloatArray,
    own: NDArray[np.int64],
) -> FloatArray:  # fmt: skip
    """Internal energy of one toggle of a pin (instances,): the mean over its edges and over its related pins."""
    total, count = np.zeros(rows.size), 0
    for arc in arcs:
        known = arc.related_pin in group.pins
        nets = group.column(arc.related_pin)[rows] if known else own
        for table in (arc.rise, arc.fall):
            if table is not None:
                total += _look_up(table, transitions[nets], loads)
                count += 1
    return total / count if count else total


def _look_up(table: Table, transitions: FloatArray, loads: FloatArray) -> FloatArray:
    return TableStack([table]).look_up(np.zeros(loads.size, np.int64), transitions, loads)
