"""Cell libraries predicted from a few process figures by the method of logical effort, as Liberty text.

Not a foundry's cells: every figure obtained with them reads "synthesised (predictive 28 nm cells)". Ratios between
designs are what they are for; nothing here was fitted to a design. Derivation:

- Fan-out-of-4 delay: 360 ps per um of drawn gate length (Ho, Mai, Horowitz, "The Future of Wires", Proc. IEEE 2001,
  typical conditions), one rule for all nodes. Logical effort gives FO4 = tau * (4 + 1), so tau = FO4 / 5.
- Logical efforts and parasitic delays: Sutherland, Sproull, Harris, "Logical Effort" (1999), chapters 1 and 4, with
  p-type transistors twice as wide as n-type (equal rise and fall) and an inverter parasitic of 1.
- Delay and transition: a gate is a resistance R / drive into C = parasitic + load. Step response: ln 2 * RC; output
  transition, 20% to 80%: ln 4 * RC; an input ramp of duration T adds (1 + 2 v) / 6 * T (Hedenstierna, Jeppsson, IEEE
  TCAD 1987) with v = Vt / Vdd = 0.25 and T the transition / 0.6. R follows by asking a chain of equal gates for the
  logical-effort delay: tau = (ln 2 + 0.25 * ln 4 / 0.6) * R * C_inverter. Cells of several stages add their stages.
- Flip-flop: transmission-gate master and slave; the tri-state stage has effort 2, parasitic 2 (Sutherland, ch. 4);
  clock to output is clock inverter, slave stage, output inverter; set-up is master stage, inverter and master feedback.
- Geometry: a cell is (transistor pairs + 1) contacted gate pitches wide, 9 metal pitches high; the flip-flop has four
  more pitches for its diffusion breaks. Transistors of drive 1 fill the height less 3 tracks (rails, gap).
- Internal energy: half C V^2 of the parasitic and internal nodes that switch; short-circuit current is left out.
- Leakage: off current per um times half the transistor width, at the supply voltage; no stack effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from bitwright.core.errors import UnknownNameError
from bitwright.engine.liberty import Library, parse_liberty

_FO4_S_PER_M = 360e-12 / 1e-6
_RAMP = (1 + 2 * 0.25) / 6 / 0.6
_STEP, _SLEW = math.log(2), math.log(4)
_TRACKS, _UNUSED_TRACKS = 9, 3
_SLEW_POINTS = (0.0, 2.0, 6.0, 20.0, 60.0)  # transitions in units of tau
_LOAD_POINTS = (0.0, 2.0, 6.0, 20.0, 60.0)  # loads in inverter inputs per unit of drive


@dataclass(frozen=True)
class Process:
    """Process figures; pitches in m, capacitance in F per m of gate width, off current in A per m."""

    gate_length_m: float
    gate_pitch_m: float
    metal_pitch_m: float
    gate_f_per_m: float
    supply_v: float
    off_a_per_m: float


# Pitches and supplies: 180 nm Yang et al., IEDM 1998; 45 nm Mistry et al., IEDM 2007; 28 nm foundry planar process,
# 117 nm and 90 nm pitch (WikiChip, "28 nm lithography process"), 0.9 V. Gate capacitance: Weste and Harris, "CMOS VLSI
# Design" (4th ed.), about 2 fF/um at 180 nm, falling to about 1 fF/um from 65 nm on. Off current: ITRS
# low-operating-power targets (5 nA/um in the 2007 and 2009 tables) at 45 and 28 nm; 20 pA/um at 180 nm.
PROCESSES: dict[str, Process] = {
    "predictive-180nm": Process(180e-9, 480e-9, 500e-9, 2.0e-9, 1.8, 20e-6),
    "predictive-45nm": Process(45e-9, 160e-9, 160e-9, 1.0e-9, 1.0, 5e-3),
    "predictive-28nm": Process(28e-9, 117e-9, 90e-9, 1.0e-9, 0.9, 5e-3),
}


@dataclass(frozen=True)
class _Stage:
    """A static gate: `effort` of the input that switches, `parasitic`, in units of the inverter, and its `drive`."""

    effort: float
    parasitic: float
    drive: float = 1.0

    @property
    def input_load(self) -> float:
        return self.effort * self.drive


@dataclass(frozen=True)
class _Gate:
    """`paths` from each input through its stages to the output, `sense`, and transistor `pairs`."""

    function: str
    paths: dict[str, tuple[tuple[_Stage, ...], ...]]
    sense: str
    pairs: float


def _inverter(drive: float) -> _Stage:
    return _Stage(1, 1, drive)


_Paths = tuple[tuple[_Stage, ...], ...]


def _gates() -> dict[str, _Gate]:
    gates: dict[str, _Gate] = {}
    for drive in (1, 2, 4, 8, 16):
        gates[f"INV_X{drive}"] = _Gate("!A", {"A": ((_inverter(drive),),)}, "negative_unate", drive)
    for drive in (2, 4, 8, 16):
        first = max(1.0, drive / 4)  # one stage effort of four
        gates[f"BUF_X{drive}"] = _Gate(
            "A", {"A": ((_inverter(first), _inverter(drive)),)}, "positive_unate", first + drive
        )
    simple: list[tuple[str, str, dict[str, float], float, tuple[int, ...]]] = [
        ("NAND2", "!(A B)", dict.fromkeys("AB", 4 / 3), 2, (1, 2, 4)),
        ("NAND3", "!(A B C)", dict.fromkeys("ABC", 5 / 3), 3, (1, 2)),
        ("NAND4", "!(A B C D)", dict.fromkeys("ABCD", 6 / 3), 4, (1,)),
        ("NOR2", "!(A + B)", dict.fromkeys("AB", 5 / 3), 2, (1, 2, 4)),
        ("NOR3", "!(A + B + C)", dict.fromkeys("ABC", 7 / 3), 3, (1,)),
        ("AOI21", "!((A B) + C)", {"A": 2, "B": 2, "C": 5 / 3}, 7 / 3, (1, 2)),
        ("OAI21", "!((A + B) C)", {"A": 2, "B": 2, "C": 4 / 3}, 8 / 3, (1, 2)),
        ("AOI22", "!((A B) + (C D))", dict.fromkeys("ABCD", 2), 4, (1, 2)),
        ("OAI22", "!((A + B) (C + D))", dict.fromkeys("ABCD", 2), 4, (1, 2)),
    ]
    for name, function, efforts, parasitic, drives in simple:
        for drive in drives:
            paths: dict[str, _Paths] = {pin: ((_Stage(effort, parasitic, drive),),) for pin, effort in efforts.items()}
            gates[f"{name}_X{drive}"] = _Gate(function, paths, "negative_unate", len(efforts) * drive)
    for drive in (1, 2):
        out = _inverter(drive)
        for name, function, gate in (("AND2", "A B", _Stage(4 / 3, 2)), ("OR2", "A + B", _Stage(5 / 3, 2))):
            gates[f"{name}_X{drive}"] = _Gate(
                function, dict.fromkeys("AB", ((gate, out),)), "positive_unate", 2 + drive
            )
        # XOR2 = !(A B + !(A + B)), XNOR2 = !((A + B) !(A B)): two paths from each input.
        late, last = _Stage(2, 7 / 3, drive), _Stage(5 / 3, 7 / 3, drive)
        xor = ((late,), (_Stage(5 / 3, 2), last))
        gates[f"XOR2_X{drive}"] = _Gate("A ^ B", dict.fromkeys("AB", xor), "non_unate", 2 + 3 * drive)
        late, last = _Stage(2, 8 / 3, drive), _Stage(4 / 3, 8 / 3, drive)
        xnor = ((late,), (_Stage(4 / 3, 2), last))
        gates[f"XNOR2_X{drive}"] = _Gate("!(A ^ B)", dict.fromkeys("AB", xnor), "non_unate", 2 + 3 * drive)
        select = _Stage(2, 4)
        through = ((select, out),)
        selects = ((select, out), (_inverter(1), select, out))
        gates[f"MUX2_X{drive}"] = _Gate("(A !S) + (B S)", {"A": through, "B": through, "S": selects}, "", 5 + drive)
    return gates


class _Units:
    """What the process figures give: tau (s), R (ohm) and C (F) of the unit inverter."""

    def __init__(self, process: Process) -> None:
        width = (_TRACKS - _UNUSED_TRACKS) * process.metal_pitch_m
        self.width_m = width
        self.capacitance_f = process.gate_f_per_m * width
        self.tau_s = _FO4_S_PER_M * process.gate_length_m / 5
        self.resistance_ohm = self.tau_s / ((_STEP + _RAMP * _SLEW) * self.capacitance_f)

    def delay(self, stages: Sequence[_Stage], slew_s: float, load_f: float) -> tuple[float, float]:
        """Delay and output transition (s) of a chain of stages into `load_f`."""
        total = 0.0
        for i, stage in enumerate(stages):
            next_f = stages[i + 1].input_load * self.capacitance_f if i + 1 < len(stages) else load_f
            time = self.resistance_ohm * (stage.parasitic * self.capacitance_f + next_f / stage.drive)
            total += _STEP * time + _RAMP * slew_s
            slew_s = _SLEW * time
        return total, slew_s


def liberty_text(name: str) -> str:
    """Liberty text of a predictive library (`PROCESSES`). Raises UnknownNameError for another name."""
    if name not in PROCESSES:
        raise UnknownNameError("predictive library", name, PROCESSES)
    process = PROCESSES[name]
    units = _Units(process)
    cells = [_gate_text(cell, gate, process, units) for cell, gate in _gates().items()]
    cells += [_flip_flop_text(drive, process, units) for drive in (1, 2)]
    slews = ", ".join(f"{point * units.tau_s * 1e12:.6g}" for point in _SLEW_POINTS)
    loads = ", ".join(f"{point * units.capacitance_f * 1e15:.6g}" for point in _LOAD_POINTS)
    return f"""library ({name.replace("-", "_")}) {{
  comment : "Predicted by logical effort; not a foundry's cells";
  delay_model : table_lookup;
  time_unit : "1ps";
  voltage_unit : "1V";
  current_unit : "1uA";
  pulling_resistance_unit : "1kohm";
  leakage_power_unit : "1nW";
  capacitive_load_unit (1, ff);
  nom_process : 1;
  nom_voltage : {process.supply_v};
  nom_temperature : 25;
  slew_lower_threshold_pct_rise : 20;
  slew_upper_threshold_pct_rise : 80;
  slew_lower_threshold_pct_fall : 20;
  slew_upper_threshold_pct_fall : 80;
  input_threshold_pct_rise : 50;
  input_threshold_pct_fall : 50;
  output_threshold_pct_rise : 50;
  output_threshold_pct_fall : 50;
  operating_conditions (typical) {{ process : 1; voltage : {process.supply_v}; temperature : 25; }}
  default_operating_conditions : typical;
  lu_table_template (delay) {{
    variable_1 : input_net_transition;
    variable_2 : total_output_net_capacitance;
    index_1 ("{slews}");
    index_2 ("{loads}");
  }}
  lu_table_template (setup) {{
    variable_1 : constrained_pin_transition;
    variable_2 : related_pin_transition;
    index_1 ("{slews}");
    index_2 ("{slews}");
  }}
{"".join(cells)}}}
"""


@cache
def predictive_library(name: str) -> Library:
    """The library `name` of `PROCESSES`, parsed. Raises UnknownNameError for another name."""
    return parse_liberty(liberty_text(name), name)


def _cell_head(name: str, pairs: float, breaks: float, width_units: float, process: Process, units: _Units) -> str:
    columns = math.ceil(pairs) + 1 + breaks
    area = columns * process.gate_pitch_m * _TRACKS * process.metal_pitch_m * 1e12
    leakage = 0.5 * width_units * units.width_m * process.off_a_per_m * process.supply_v
    return f"  cell ({name}) {{\n    area : {area:.6g};\n    cell_leakage_power : {leakage * 1e9:.6g};\n"


def _values(rows: Sequence[Sequence[float]], scale: float) -> str:
    return ", ".join('"' + ", ".join(f"{value * scale:.6g}" for value in row) + '"' for row in rows)


def _delay_tables(units: _Units, paths: Sequence[Sequence[_Stage]], drive: float) -> str:
    """Tables of the slowest of `paths`, the same for rise and fall; loads scale with the drive."""
    loads = [point * drive * units.capacitance_f for point in _LOAD_POINTS]
    grid = [[max(units.delay(path, slew * units.tau_s, load) for path in paths) for load in loads]
            for slew in _SLEW_POINTS]  # fmt: skip
    index = ", ".join(f"{load * 1e15:.6g}" for load in loads)
    text = ""
    for edge in ("rise", "fall"):
        for table, part in ((f"cell_{edge}", 0), (f"{edge}_transition", 1)):
            values = _values([[point[part] for point in row] for row in grid], 1e12)
            text += f'        {table} (delay) {{ index_2 ("{index}"); values ({values}); }}\n'
    return text


def _energy_text(related: str, internal_f: float, voltage: float) -> str:
    energy = 0.5 * internal_f * voltage**2 * 1e15
    tables = "".join(f'{edge}_power (scalar) {{ values ("{energy:.6g}"); }} ' for edge in ("rise", "fall"))
    relation = f'related_pin : "{related}"; ' if related else ""
    return f"      internal_power () {{ {relation}{tables}}}\n"


def _gate_text(name: str, gate: _Gate, process: Process, units: _Units) -> str:
    drive = next(iter(gate.paths.values()))[0][-1].drive
    inputs, output = "", f'    pin (Y) {{\n      direction : output;\n      function : "{gate.function}";\n'
    widths = 0.0
    for pin, paths in gate.paths.items():
        firsts = [path[0].input_load for path in paths]
        load = sum(firsts)
        widths += load
        inputs += f"    pin ({pin}) {{ direction : input; capacitance : {load * units.capacitance_f * 1e15:.6g}; }}\n"
        sense = gate.sense or ("non_unate" if pin == "S" else "positive_unate")
        output += f'      timing () {{\n        related_pin : "{pin}";\n        timing_sense : {sense};\n'
        output += _delay_tables(units, paths, drive) + "      }\n"
        # Internal nodes of the longest path switch with the output: stage outputs' parasitics and the gates they drive.
        longest = max(paths, key=len)
        internal = sum(stage.parasitic * stage.drive for stage in longest)
        internal += sum(stage.input_load for stage in longest[1:])
        output += _energy_text(pin, internal * units.capacitance_f, process.supply_v)
    inner = {stage for paths in gate.paths.values() for path in paths for stage in path[1:]}
    widths += sum(stage.input_load for stage in inner)
    head = _cell_head(name, gate.pairs, 0, widths, process, units)
    return head + inputs + output + "    }\n  }\n"


def _flip_flop_text(drive: int, process: Process, units: _Units) -> str:
    latch, inverter, out = _Stage(2, 2), _inverter(1), _inverter(drive)
    # Two clock inverters feed four transmission gates, each one unit of gate width per phase.
    clock = (inverter, _Stage(4, 1), latch, out)
    femto = units.capacitance_f * 1e15
    master, master_load_f = (latch, inverter, latch), 2 * units.capacitance_f
    delays = [units.delay(master, slew * units.tau_s, master_load_f)[0] for slew in _SLEW_POINTS]
    zero = [[delay] * len(_SLEW_POINTS) for delay in delays]
    setup = "".join(
        f"        {edge}_constraint (setup) {{ values ({_values(zero, 1e12)}); }}\n" for edge in ("rise", "fall")
    )
    clock_f = (1 + 1 + 4 + 1 + 4) * units.capacitance_f  # parasitics and loads of the two clock inverters
    output_f = (latch.parasitic + 1 + 1 + 2 + drive) * units.capacitance_f + out.input_load * units.capacitance_f
    text = _cell_head(f"DFF_X{drive}", 11 + drive, 4, 12 + 2 * drive, process, units)
    text += '    ff (IQ, IQN) { next_state : "D"; clocked_on : "CK"; }\n'
    text += f"    pin (CK) {{\n      direction : input; clock : true; capacitance : {femto:.6g};\n"
    text += _energy_text("", clock_f, process.supply_v) + "    }\n"
    text += f"    pin (D) {{\n      direction : input; capacitance : {latch.input_load * femto:.6g};\n"
    text += f'      timing () {{\n        related_pin : "CK";\n        timing_type : setup_rising;\n{setup}      }}\n'
    # The master follows the data while the clock is low: its stage, inverter and feedback switch.
    text += _energy_text("", (2 + 1 + 1 + 2) * units.capacitance_f, process.supply_v) + "    }\n"
    text += '    pin (Q) {\n      direction : output;\n      function : "IQ";\n'
    text += '      timing () {\n        related_pin : "CK";\n        timing_type : rising_edge;\n'
    text += "        timing_sense : non_unate;\n" + _delay_tables(units, (clock,), drive) + "      }\n"
    return text + _energy_text("CK", output_f, process.supply_v) + "    }\n  }\n"
