"""One design as Verilog, as Amaranth and as mapped cells in every simulator, against plain Python; broken ones too."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
from amaranth.hdl import Elaboratable, Module, Signal, signed
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import BitwrightError, InputError, ToolError, UnknownNameError
from bitwright.engine.gate_simulation import simulate
from bitwright.engine.libraries import find_library
from bitwright.engine.synthesis import synthesise
from bitwright.engine.testbench import (
    Waveforms,
    simulate_amaranth,
    simulate_netlist,
    simulate_verilog,
    verilog_testbench,
    write_testbench,
)

icarus = pytest.param(
    "icarus",
    marks=[pytest.mark.eda, pytest.mark.skipif(not shutil.which("iverilog"), reason="Icarus Verilog is not installed")],
)
verilator = pytest.param(
    "verilator",
    marks=[pytest.mark.eda, pytest.mark.skipif(not shutil.which("verilator"), reason="Verilator is not installed")],
)
every = pytest.mark.parametrize("simulator", ["amaranth", "netlist", icarus, verilator])
quick = pytest.mark.parametrize("simulator", ["amaranth", "netlist", icarus])  # Verilator compiles for seconds
compiled = pytest.mark.parametrize("simulator", [icarus, verilator])
VERILOG = """
module mac(input clk, input rst, input valid, input signed [7:0] a, input [4:0] b, input [63:0] word,
           output signed [13:0] product, output reg signed [20:0] total, output reg [63:0] echo, output reg taken);
  wire signed [5:0] positive = {1'b0, b};
  assign product = a * positive;
  always @(posedge clk) begin
    echo <= word;
    if (rst) begin total <= 0; taken <= 0; end
    else begin taken <= valid; if (valid) total <= total + product; end
  end
endmodule
"""
WIDTHS = {"valid": 1, "a": 8, "b": 5, "word": 64, "product": 14, "total": 21, "echo": 64, "taken": 1}


class Mac(Elaboratable):
    """The same design in Amaranth."""

    _MustUse__silence = True  # some are refused before they are elaborated

    def __init__(self):
        shapes = {"valid": 1, "a": signed(8), "b": 5, "word": 64}
        shapes |= {"product": signed(14), "total": signed(21), "echo": 64, "taken": 1}
        self.ports = {name: Signal(shape, name=name) for name, shape in shapes.items()}

    def elaborate(self, platform):
        module, ports = Module(), self.ports
        module.d.comb += ports["product"].eq(ports["a"] * ports["b"])
        module.d.sync += [ports["echo"].eq(ports["word"]), ports["taken"].eq(ports["valid"])]
        with module.If(ports["valid"]):
            module.d.sync += ports["total"].eq(ports["total"] + ports["product"])
        return module


def waveforms(cycles=60, seed=0):
    rng = np.random.default_rng(seed)
    inputs = {
        "valid": rng.integers(0, 2, cycles), "a": rng.integers(-128, 128, cycles), "b": rng.integers(0, 32, cycles),
        "word": rng.integers(-(1 << 63), 1 << 63, cycles, dtype=np.int64),
    }  # fmt: skip
    inputs["word"][:2] = (1 << 63) - 1, -(1 << 63)
    expected = {name: np.zeros(cycles, np.int64) for name in ("product", "total", "echo", "taken")}
    total = 0
    for cycle in range(cycles):
        valid, a, b, word = (int(inputs[name][cycle]) for name in ("valid", "a", "b", "word"))
        expected["product"][cycle] = a * b
        expected["total"][cycle] = total
        if cycle + 1 < cycles:
            expected["echo"][cycle + 1], expected["taken"][cycle + 1] = word, valid
        total += a * b * valid
    care = {"product": inputs["valid"].astype(bool)}
    expected["product"] = np.where(care["product"], expected["product"], 5)  # must not count
    return Waveforms(inputs, expected, care, WIDTHS, reset_cycles=3)


@pytest.fixture(scope="module")
def netlist(tmp_path_factory):
    library = find_library("predictive-28nm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITWRIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield synthesise(VERILOG, "mac", library).netlist(library)


@pytest.fixture
def run(netlist):
    def simulated(simulator, waves, verilog=VERILOG, **options):
        if simulator == "amaranth":
            design = Mac()
            return simulate_amaranth(design, design.ports, waves, **options)
        if simulator == "netlist":
            return simulate_netlist(netlist, waves)
        return simulate_verilog(verilog, "mac", waves, simulator, **options)

    return simulated


def changed(waves, name, cycle, difference=1):
    values = waves.expected[name].copy()
    values[cycle] ^= difference
    return dataclasses.replace(waves, expected={**waves.expected, name: values})


@quick
def test_right_hardware_passes(simulator, run):
    result = run(simulator, waveforms())
    assert result.passed, result
    assert (result.simulator, result.cycles, result.first_mismatch) == (simulator, 60, "")


@every
def test_a_wrong_expected_value_is_found_and_described_alike(simulator, run):
    waves = waveforms()
    want = int(waves.expected["total"][41]) & 0x1FFFFF
    result = run(simulator, changed(changed(waves, "taken", 50), "total", 41, 1 << 20))
    assert result.mismatches == 2
    assert result.first_mismatch == f"cycle 41: total is {want:06x}, expected {want ^ 1 << 20:06x}"


@quick
def test_the_top_bit_of_a_64_bit_port_counts(simulator, run):
    assert run(simulator, changed(waveforms(), "echo", 9, -(1 << 63))).mismatches == 1


@quick
def test_only_cycles_with_care_count(simulator, run):
    waves = waveforms()
    idle, busy = (int(np.flatnonzero(waves.inputs["valid"] == value)[3]) for value in (0, 1))
    assert run(simulator, changed(waves, "product", idle)).passed
    assert run(simulator, changed(waves, "product", busy)).mismatches == 1


@quick
def test_unsigned_and_signed_readings_are_the_same(simulator, run):
    waves = waveforms()
    inputs = {**waves.inputs, "a": waves.inputs["a"] & 255}
    expected = {**waves.expected, "total": waves.expected["total"] & 0x1FFFFF}
    assert run(simulator, dataclasses.replace(waves, inputs=inputs, expected=expected)).passed


@every
def test_a_width_other_than_the_designs_is_refused(simulator, run):
    waves = dataclasses.replace(waveforms(), widths={**WIDTHS, "total": 22})
    with pytest.raises(InputError, match="port total is 21 bits wide, 22 in the waveforms"):
        run(simulator, waves)


@every
def test_a_port_that_the_design_does_not_have_is_refused(simulator, run):
    waves = waveforms()
    waves = dataclasses.replace(
        waves, expected={**waves.expected, "done": waves.expected["taken"]}, widths={**WIDTHS, "done": 1}
    )
    with pytest.raises(BitwrightError, match="done"):
        run(simulator, waves)


@pytest.mark.parametrize("simulator", [icarus])
def test_wrong_hardware_is_noticed(simulator, run):
    assert not run(simulator, waveforms(), VERILOG.replace("total + product", "total - product")).passed


@compiled
def test_a_forgotten_reset_is_noticed(simulator, run):
    result = run(simulator, waveforms(), VERILOG.replace("total <= 0;", ""))
    assert result.first_mismatch.startswith("cycle 0: total is ")


def test_netlist_and_plain_simulation_agree(netlist):
    """The waveforms' reset and cycles, driven by hand."""
    waves = waveforms()
    inputs = {name: np.concatenate([np.zeros(3, np.int64), values])[:, None] for name, values in waves.inputs.items()}
    inputs["rst"] = np.array([1] * 3 + [0] * 60)[:, None]
    total = simulate(netlist, inputs).signed_output("total", 21)[3:, 0]
    assert np.array_equal(total, waves.expected["total"])


@quick
def test_a_combinational_design_needs_neither_clock_nor_reset(simulator):
    class Sum(Elaboratable):
        def __init__(self):
            self.ports = {"x": Signal(4), "y": Signal(4), "z": Signal(5)}

        def elaborate(self, platform):
            module = Module()
            module.d.comb += self.ports["z"].eq(self.ports["x"] + self.ports["y"])
            return module

    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(16), np.arange(16)))
    waves = Waveforms({"x": x, "y": y}, {"z": x + y}, {}, {"x": 4, "y": 4, "z": 5}, 0, clock="", reset="")
    text = "module sum(input [3:0] x, y, output [4:0] z); assign z = x + y; endmodule"
    library = find_library("predictive-28nm")
    for each in (waves, changed(waves, "z", 77)):
        if simulator == "amaranth":
            design = Sum()
            result = simulate_amaranth(design, design.ports, each)
        elif simulator == "netlist":
            result = simulate_netlist(synthesise(text, "sum", library).netlist(library), each)
        else:
            result = simulate_verilog(text, "sum", each, simulator)
        assert result.mismatches == (each is not waves)


@pytest.mark.parametrize("simulator", ["amaranth", icarus, verilator])
def test_waveforms_are_written_on_request(simulator, run, tmp_path):
    target = tmp_path / "new" / f"{simulator}.vcd"
    assert run(simulator, waveforms(), vcd=target).passed
    text = target.read_text()
    assert "$enddefinitions" in text
    for name in ("product", "total", "taken"):
        assert f" {name} " in text
    assert [each.name for each in target.parent.iterdir()] == [target.name]


@compiled
def test_broken_verilog_is_a_tool_error(simulator, run):
    with pytest.raises(ToolError, match=r"failed \(status"):
        run(simulator, waveforms(), VERILOG.replace("endmodule", ""))


@pytest.mark.parametrize("simulator", [icarus])
def test_a_simulation_that_ends_early_is_a_tool_error(simulator, run):
    early = "`timescale 1ns/1ps\n" + VERILOG.replace("endmodule", "initial #100 $finish; endmodule")
    with pytest.raises(ToolError, match="without a result"):
        run(simulator, waveforms(), early)


@pytest.mark.parametrize("simulator", [icarus])
def test_a_simulation_that_never_ends_is_stopped(simulator, run):
    endless = VERILOG.replace("endmodule", "reg x; initial begin x = 0; forever #0 x = ~x; end endmodule")
    with pytest.raises(ToolError, match="vvp did not finish within 3 s"):
        run(simulator, waveforms(), endless, timeout_s=3)


@compiled
def test_time_runs_out_while_compiling(simulator, run):
    with pytest.raises(ToolError, match=r"did not finish within 0\.001 s"):
        run(simulator, waveforms(), timeout_s=0.001)


def test_missing_and_unknown_simulators(run, monkeypatch):
    with pytest.raises(UnknownNameError, match="icarus, verilator"):
        run("modelsim", waveforms())
    monkeypatch.setenv("PATH", "/nonexistent")
    for simulator in ("icarus", "verilator"):
        with pytest.raises(ToolError, match="not installed"):
            run(simulator, waveforms())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": {**WIDTHS, "a": 7}}, "'a' of 7 bits cannot hold"),
        ({"widths": {**WIDTHS, "total": 8}}, "'total' of 8 bits cannot hold"),
        ({"widths": {**WIDTHS, "word": 65}}, "1 to 64"),
        ({"widths": {**WIDTHS, "valid": 0}}, "1 to 64"),
        ({"widths": {}}, "'valid' has no width"),
        ({"expected": {}}, "nothing would be compared"),
        ({"expected": {"total": np.zeros(60, np.int64)}, "care": {"total": np.zeros(60, bool)}}, "never true"),
        ({"expected": {"total": np.zeros(59, np.int64)}, "care": {}}, "same length"),
        ({"expected": {"total": np.zeros((60, 1), np.int64)}, "care": {}}, "same length"),
        ({"care": {"result": np.ones(60, bool)}}, "result"),
        ({"care": {"total": np.ones(61, bool)}}, "same length"),
        ({"reset_cycles": -1}, "negative"),
        ({"reset": "valid"}, "given twice"),
        ({"clock": "c k"}, "plain Verilog name"),
        ({"inputs": {"tb_now": np.zeros(60, np.int64)}}, "plain Verilog name"),
    ],
)  # fmt: skip
def test_unusable_waveforms_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(waveforms(), **change)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_line_of_stimulus_reads_back(data):
    widths = {
        f"p{index}": bits for index, bits in enumerate(data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=6)))
    }
    cycles = data.draw(st.integers(1, 5))
    values = {
        name: np.array(
            data.draw(
                st.lists(st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), min_size=cycles, max_size=cycles)
            )
        )
        for name, bits in widths.items()
    }
    care = np.array(data.draw(st.lists(st.booleans(), min_size=cycles, max_size=cycles)))
    care[0] = True
    first, *others = widths
    waves = Waveforms({name: values[name] for name in others}, {first: values[first]}, {first: care}, widths, 1)
    bench, stimulus = verilog_testbench("any", waves)
    for cycle, line in enumerate(stimulus.split()):
        word = "".join(
            f"{int(values[name][cycle]) & ((1 << widths[name]) - 1):0{-(-widths[name] // 4)}x}" for name in others
        )
        kept = int(values[first][cycle]) if care[cycle] else 0
        word += f"{kept & ((1 << widths[first]) - 1):0{-(-widths[first] // 4)}x}{int(care[cycle])}"
        assert line == word
    assert f"tb_memory [0:{cycles - 1}]" in bench


def test_everything_to_simulate_elsewhere_is_written(tmp_path):
    folder = tmp_path / "new"
    files = write_testbench(folder, VERILOG, "mac", waveforms(), "A title")
    assert sorted(files) == sorted(folder.iterdir())
    assert {file.name for file in files} == {
        "design.v", "testbench.v", "stimulus.hex", "test_mac.py", "Makefile", "README.md"
    }  # fmt: skip
    assert (folder / "testbench.v").read_text().startswith("// A title\n")
    compile((folder / "test_mac.py").read_text(), "test_mac.py", "exec")
    (tmp_path / "file").write_text("")
    with pytest.raises(BitwrightError, match="Cannot write"):
        write_testbench(tmp_path / "file", VERILOG, "mac", waveforms())


@pytest.mark.parametrize("simulator", [icarus])
def test_written_verilog_testbench_runs_as_the_readme_says(simulator, tmp_path):
    write_testbench(tmp_path, VERILOG, "mac", waveforms())
    commands = (tmp_path / "README.md").read_text().split("Icarus: `")[1].split("`")[0].split(" && ")
    output = ""
    for command in commands:
        output = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "SUMMARY 0 60" in output
    assert (tmp_path / "waveforms.vcd").exists()


@pytest.mark.parametrize("simulator", [icarus])
@pytest.mark.parametrize("right", [True, False])
def test_written_cocotb_test(simulator, right, tmp_path):
    pytest.importorskip("cocotb_tools", reason="cocotb 2 is not installed")
    waves = waveforms()
    write_testbench(tmp_path, VERILOG, "mac", waves if right else changed(waves, "total", 30))
    done = subprocess.run([sys.executable, "test_mac.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == right, text
    assert ("PASS=1 FAIL=0" if right else "cycle 30: total is") in text
