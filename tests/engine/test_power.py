"""Power of small netlists: against a calculation by hand from the library's tables, and against OpenSTA."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from bitwright.core.errors import InputError
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.liberty import parse_liberty
from bitwright.engine.libraries import find_library, library_names
from bitwright.engine.netlist import read_netlist
from bitwright.engine.power import activity_power, vectorless_power
from bitwright.engine.synthesis import synthesise
from bitwright.engine.timing import analyse_timing
from bitwright.engine.yosys import run_yosys

# Tables over transition (rows: 0 and 1 ns) and load (columns: 0 and 1 pF): linear, so every value follows by hand.
GRID = 'index_1 ("0, 1"); index_2 ("0, 1");'


def tables(name, *groups):
    return "".join(f"{table} ({name}) {{ values ({values}); }}" for table, values in groups)


def arc(pin, rise, fall, sense="negative_unate", kind="combinational"):
    """Transitions `rise` and `fall` at zero; each grows by 0.1 per ns, rise by 4 and fall by 2 ns per pF."""
    delay = '"1, 11", "1.1, 11.1"'
    transitions = [f'"{at}, {at + slope}", "{at + 0.1}, {at + 0.1 + slope}"' for at, slope in ((rise, 4), (fall, 2))]
    groups = [("cell_rise", delay), ("cell_fall", delay), ("rise_transition", transitions[0])]
    return (
        f'timing () {{ related_pin : "{pin}"; timing_type : {kind}; timing_sense : {sense}; '
        + tables("t", *groups, ("fall_transition", transitions[1]))
        + "}"
    )


def energy(pin, rise, fall):
    """`rise` and `fall` (pJ): at zero, growth per ns, growth per pF."""
    values = [f'"{at}, {at + load}", "{at + slew}, {at + slew + load}"' for at, slew, load in (rise, fall)]
    return (
        f'internal_power () {{ related_pin : "{pin}"; '
        + tables("e", ("rise_power", values[0]), ("fall_power", values[1]))
        + "}"
    )


def own_energy(rise, fall):
    values = [f'"{at}, {at + slew}"' for at, slew in (rise, fall)]
    return "internal_power () { " + tables("p", ("rise_power", values[0]), ("fall_power", values[1])) + "}"


def input_pin(name, capacitance, more=""):
    return f"pin ({name}) {{ direction : input; capacitance : {capacitance}; {more} }}"


SETUP = (
    'timing () { related_pin : "CK"; timing_type : setup_rising; '
    + tables("s", *((f"{edge}_constraint", '"0.1, 0.1", "0.2, 0.2"') for edge in ("rise", "fall")))
    + "}"
)
LIBRARY = f"""library (hand) {{
  delay_model : table_lookup; time_unit : "1ns"; voltage_unit : "1V"; current_unit : "1mA";
  pulling_resistance_unit : "1kohm"; leakage_power_unit : "1nW"; capacitive_load_unit (1, pf);
  nom_process : 1; nom_temperature : 25; nom_voltage : 2;
  slew_lower_threshold_pct_rise : 20; slew_upper_threshold_pct_rise : 80; slew_lower_threshold_pct_fall : 20;
  slew_upper_threshold_pct_fall : 80; input_threshold_pct_rise : 50; input_threshold_pct_fall : 50;
  output_threshold_pct_rise : 50; output_threshold_pct_fall : 50;
  operating_conditions (typical) {{ process : 1; voltage : 2; temperature : 25; }}
  default_operating_conditions : typical;
  lu_table_template (t) {{ variable_1 : input_net_transition; variable_2 : total_output_net_capacitance; {GRID} }}
  lu_table_template (s) {{ variable_1 : constrained_pin_transition; variable_2 : related_pin_transition; {GRID} }}
  power_lut_template (e) {{ variable_1 : input_transition_time; variable_2 : total_output_net_capacitance; {GRID} }}
  power_lut_template (p) {{ variable_1 : input_transition_time; index_1 ("0, 1"); }}
  cell (INV) {{ area : 1; cell_leakage_power : 3; {input_pin("A", 0.01)}
    pin (Y) {{ direction : output; function : "!A"; {arc("A", 0.05, 0.03)}
      {energy("A", (0.010, 0.04, 0.02), (0.006, 0.02, 0.01))} }} }}
  cell (NAND2) {{ area : 1.5; cell_leakage_power : 5; {input_pin("A", 0.02)} {input_pin("B", 0.03)}
    pin (Y) {{ direction : output; function : "!(A B)"; {arc("A", 0.06, 0.04)} {arc("B", 0.06, 0.04)}
      {energy("A", (0.012, 0.04, 0.02), (0.008, 0.02, 0.01))}
      {energy("B", (0.016, 0.04, 0.02), (0.004, 0.02, 0.01))} }} }}
  cell (DFF) {{ area : 4; cell_leakage_power : 7; ff (IQ, IQN) {{ next_state : "D"; clocked_on : "CK"; }}
    {input_pin("CK", 0.015, "clock : true; " + own_energy((0.020, 0.01), (0.024, 0.01)))}
    {input_pin("D", 0.025, SETUP + own_energy((0.002, 0.04), (0.004, 0.04)))}
    pin (Q) {{ direction : output; function : "IQ"; {arc("CK", 0.08, 0.07, "non_unate", "rising_edge")}
      {energy("CK", (0.040, 0.04, 0.02), (0.036, 0.04, 0.02))} }} }}
}}
"""
# a, b -> NAND2 g -> m -> INV h -> n -> DFF f -> q -> INV k -> z
NETLIST = json.dumps({"modules": {"tiny": {
    "ports": {name: {"direction": "output" if name == "z" else "input", "bits": [bit]}
              for name, bit in (("a", 2), ("b", 3), ("clk", 4), ("z", 8))},
    "cells": {
        "g": {"type": "NAND2", "connections": {"A": [2], "B": [3], "Y": [5]}},
        "h": {"type": "INV", "connections": {"A": [5], "Y": [6]}},
        "f": {"type": "DFF", "connections": {"CK": [4], "D": [6], "Q": [7]}},
        "k": {"type": "INV", "connections": {"A": [7], "Y": [8]}},
    },
}}})  # fmt: skip
MULTIPLIER = """module mult(input clk, input [7:0] a, b, output reg [15:0] p);
  reg [7:0] x, y; always @(posedge clk) begin x <= a; y <= b; p <= x * y; end endmodule"""


def tiny():
    return read_netlist(NETLIST, "tiny", parse_liberty(LIBRARY, "hand.lib"))


def test_power_is_what_the_tables_say_by_hand():
    """pJ, ns, pF and V throughout; the output z is loaded with 0.05 pF."""
    netlist = tiny()
    a, b = ([0, 1, 1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1, 1, 1])
    # m = n' = 1 0 1 1 0 0 0 1 0 changes 5 times in 8 intervals, q = 0 0 1 0 0 1 1 1 0 (n one cycle later) 4 times.
    logic, state = 5 / 8, 4 / 8
    result = simulate(netlist, {"a": np.array(a)[:, None], "b": np.array(b)[:, None]})
    timing = analyse_timing(netlist, output_load_f=0.05e-12)
    power = activity_power(netlist, result.toggles, result.intervals, 10e-9, timing)

    # The larger transition of each net: m rises with 0.06 + 4 * 0.01 (the input of h) from steep inputs,
    # n rises with 0.05 + 0.1 * 0.06 (m falling: 0.04 + 2 * 0.01) + 4 * 0.025 (D), q rises with 0.08 + 4 * 0.01 (k).
    m, n, q = 0.10, 0.156, 0.12
    # Internal energy of one transition: the mean of rise and fall (and of both inputs' tables for the NAND).
    g = (0.012 + 0.02 * 0.01 + 0.008 + 0.01 * 0.01 + 0.016 + 0.02 * 0.01 + 0.004 + 0.01 * 0.01) / 4
    h = (0.010 + 0.04 * m + 0.02 * 0.025 + 0.006 + 0.02 * m + 0.01 * 0.025) / 2
    k = (0.010 + 0.04 * q + 0.02 * 0.05 + 0.006 + 0.02 * q + 0.01 * 0.05) / 2
    f_data = (0.002 + 0.04 * n + 0.004 + 0.04 * n) / 2
    f_output = (0.040 + 0.02 * 0.01 + 0.036 + 0.02 * 0.01) / 2
    # Charging: half of C V^2 = 4 C a transition, of the net that the cell drives.
    combinational = logic * (g + 2 * 0.01 + h + 2 * 0.025) + state * (k + 2 * 0.05)
    sequential = logic * f_data + state * (f_output + 2 * 0.01)
    clock = 0.020 + 0.024 + 4 * 0.015  # both edges in every cycle, and the charge of the clock pin
    assert power.combinational_j * 1e12 == pytest.approx(combinational)
    assert power.sequential_j * 1e12 == pytest.approx(sequential)
    assert power.clock_j * 1e12 == pytest.approx(clock)
    assert power.leakage_w * 1e9 == pytest.approx(5 + 3 + 7 + 3)
    assert power.power_w * 1e9 == pytest.approx((combinational + sequential + clock) * 1e-3 / 10e-9 + 18)


def test_vectorless_power_is_that_of_equal_activity_but_is_called_so():
    netlist = tiny()
    simulated = activity_power(netlist, np.full(netlist.net_count, 2), 8, 10e-9)
    vectorless = vectorless_power(netlist, 10e-9, 0.25)
    assert vectorless.power_w == pytest.approx(simulated.power_w, abs=0)
    assert (simulated.activity, vectorless.activity) == ("simulated", "vectorless")


def test_unusable_activity_is_refused():
    netlist = tiny()
    with pytest.raises(InputError, match="do not belong"):
        activity_power(netlist, np.zeros(3, np.int64), 8, 1e-9)
    with pytest.raises(InputError, match="two cycles or more"):
        activity_power(netlist, np.zeros(netlist.net_count, np.int64), 0, 1e-9)
    with pytest.raises(InputError, match="must be positive"):
        activity_power(netlist, np.zeros(netlist.net_count, np.int64), 8, 0.0)
    with pytest.raises(InputError, match="between 0 and 1"):
        vectorless_power(netlist, 1e-9, 1.5)


def without_internal_energy(text):
    """A library whose only dynamic energy is the charging of nets and clock pins."""
    return re.sub(r"internal_power\s*\(\s*\)\s*\{(?:[^{}]|\{[^{}]*\})*\}", "", text)


def opensta(folder, library, verilog, top, inputs, activity):
    """By group of cells: internal and switching energy per cycle of 10 ns (J), leakage (W)."""
    (folder / "cells.lib").write_text(re.sub(r"default_wire_load\s*:[^;]*;", "", library.text))
    (folder / "n.v").write_text(verilog)
    (folder / "run.tcl").write_text(f"""read_liberty cells.lib
read_verilog n.v
link_design {top}
create_clock -name c -period 10 [get_ports clk]
set_input_transition 0 [all_inputs]
set_input_delay 0 -clock c [get_ports {{{inputs}}}]
set_power_activity -global -activity {activity}
report_power -digits 8
""")
    done = subprocess.run(
        ["sta", "-exit", "run.tcl"], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    found = {}
    for group in ("Sequential", "Combinational"):
        internal, switching, leakage = map(float, re.search(rf"^{group}\s+(.*)", done.stdout, re.M)[1].split()[:3])
        found[group] = (internal * 10e-9, switching * 10e-9, leakage)
    return found


@pytest.mark.eda
@pytest.mark.parametrize("design", ["tiny", "mult"])
def test_power_against_opensta(design, tmp_path, monkeypatch):
    """OpenSTA 2.0 at equal activity of all nets (`set_power_activity -global`; it has no `set_switching_activity`).

    Measured OpenSTA / ours: leakage 1.0000, charging 1.0000 (hand-written cells) and 0.9991 (OSU 180 nm), internal
    energy of logic 1.96 (both), of flip-flops 1.95 and 1.88. The factor of two: for every transition it adds the
    energies of a rising and of a falling edge, where its later versions and we take their mean, as Liberty gives them
    per edge (its data pins have the factor 1). What remains is the transition time, of which we take the larger edge
    for both tables. Cells of three and four inputs are left out: it weighs the tables of their inputs with more than
    one in sum, so that with them the ratio is 2.26 (3.4 for AOI21X1 alone, 4.0 for AOI22X1).
    """
    if shutil.which("sta") is None:
        pytest.skip("OpenSTA (`sta`) is not installed")
    version = subprocess.run(["sta", "-version"], capture_output=True, text=True, check=False).stdout.strip()
    if not version.startswith("2.0."):
        pytest.skip(f"the comparison knows how OpenSTA 2.0 weighs energies; this is {version}")
    if design == "tiny":
        library, text, inputs = parse_liberty(LIBRARY, "hand.lib"), NETLIST, "a b"
    else:
        if "osu018" not in library_names():
            pytest.skip("the OSU 180 nm cells (qflow-tech-osu018) are not installed")
        monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
        complete = find_library("osu018").text
        library = parse_liberty(
            re.sub(r"(cell \((?:AOI|OAI|NAND3|NOR3)\w*\)\s*\{)", r"\1 dont_use : true;", complete), "few.lib"
        )
        text, inputs = synthesise(MULTIPLIER, "mult", library).netlist_json, "a[*] b[*]"
    verilog = run_yosys("read_json n.json\nwrite_verilog -noattr -noexpr n.v", {"n.json": text}, ["n.v"])["n.v"]
    theirs = opensta(tmp_path, library, verilog, design, inputs, 0.25)

    def ours(cells):
        netlist = read_netlist(text, design, cells)
        timing = analyse_timing(netlist, output_load_f=0.0)
        return activity_power(netlist, np.full(netlist.net_count, 2), 8, 10e-9, timing)

    whole, charging = ours(library), ours(parse_liberty(without_internal_energy(library.text), "charging.lib"))
    (seq_internal, seq_charging, seq_leakage), (internal, switching, leakage) = theirs.values()
    assert charging.combinational_j == pytest.approx(switching, rel=2e-3, abs=0)
    assert charging.sequential_j == pytest.approx(seq_charging, rel=2e-3, abs=0)
    assert whole.leakage_w == pytest.approx(leakage + seq_leakage, rel=1e-4, abs=0)
    assert internal / (whole.combinational_j - charging.combinational_j) == pytest.approx(2, rel=0.03)
    flip_flops_j = whole.sequential_j - charging.sequential_j + whole.clock_j - charging.clock_j
    assert 1.8 < seq_internal / flip_flops_j < 2
