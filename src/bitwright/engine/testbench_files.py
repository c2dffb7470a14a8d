"""Testbenches as text and files: self-checking Verilog, its stimulus, and a cocotb test of the same stimulus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.core.files import write_whole
from bitwright.engine.waveforms import Port, Waveforms

TESTBENCH, STIMULUS, VCD = "testbench", "stimulus.hex", "waveforms.vcd"
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)


@dataclass(frozen=True)
class _Field:
    """A waveform in the stimulus file: hexadecimal digits `first` up to `first` + `digits` of each line."""

    port: Port
    first: int
    digits: int
    values: NDArray[np.int64] = field(repr=False)

    def slice_of(self, word: str, line_digits: int) -> str:
        """Its bits in `word`, the line read as one number."""
        low = 4 * (line_digits - self.first - self.digits)
        return f"{word}[{low + self.port.bits - 1}:{low}]"


@dataclass(frozen=True)
class _Layout:
    """Fields of a line of stimulus, left to right: inputs, expected outputs, then one digit per distinct care mask.

    `care` maps an output to the field with its mask. Every field takes whole digits, so lines can be read by eye.
    """

    inputs: Mapping[str, _Field]
    expected: Mapping[str, _Field]
    care: Mapping[str, _Field]
    digits: int


def _layout(waveforms: Waveforms) -> _Layout:
    at = 0

    def place(port: Port, values: NDArray[Any]) -> _Field:
        nonlocal at
        digits = -(-port.bits // 4)
        at += digits
        return _Field(port, at - digits, digits, np.asarray(values).astype(np.int64))

    inputs = {port.name: place(port, waveforms.inputs[port.name]) for port in waveforms.driven}
    expected = {port.name: place(port, np.where(waveforms.care.get(port.name, True), waveforms.expected[port.name], 0))
                for port in waveforms.compared}  # fmt: skip
    masks: dict[bytes, _Field] = {}
    care = {}
    for name, mask in waveforms.care.items():
        key = np.asarray(mask, bool).tobytes()
        if key not in masks:
            masks[key] = place(Port(f"tb_care_{len(masks)}", 1), mask)
        care[name] = masks[key]
    return _Layout(inputs, expected, care, at)


def _stimulus_text(layout: _Layout, cycles: int) -> str:
    masks = {mask.first: mask for mask in layout.care.values()}
    fields = [*layout.inputs.values(), *layout.expected.values(), *masks.values()]
    text = np.empty((cycles, layout.digits + 1), np.uint8)
    text[:, -1] = ord("\n")
    for each in fields:
        values = each.values.view(np.uint64)
        if each.port.bits < 64:
            values = values & np.uint64((1 << each.port.bits) - 1)
        for digit in range(each.digits):
            place = np.uint64(4 * (each.digits - 1 - digit))
            text[:, each.first + digit] = _DIGITS[((values >> place) & np.uint64(15)).astype(np.intp)]
    return text.tobytes().decode("ascii")


def verilog_testbench(top: str, waveforms: Waveforms, title: str = "") -> tuple[str, str]:
    """A self-checking Verilog testbench of module `top` and the file `stimulus.hex` that it reads, as text.

    It prints `MISMATCH ...` for the first differing outputs and `SUMMARY <mismatching outputs> <cycles>` at the end;
    with the argument `+vcd` it writes `waveforms.vcd`. Each line of the stimulus is one cycle: inputs, expected
    outputs and care bits from left to right in whole hexadecimal digits.
    """
    layout = _layout(waveforms)
    clock, reset = waveforms.clock or "tb_clock", waveforms.reset or "tb_reset"
    ports = [name for name in (waveforms.clock, waveforms.reset) if name] + [*layout.inputs, *layout.expected]
    now = "tb_now"
    driven = "\n".join(f"  wire [{each.port.bits - 1}:0] {name} = {each.slice_of(now, layout.digits)};"
                       for name, each in layout.inputs.items())  # fmt: skip
    seen = "\n".join(f"  wire [{each.port.bits - 1}:0] {name};" for name, each in layout.expected.items())
    widths = "\n".join(
        f'    if ($bits(dut.{name}) != {each.port.bits}) begin tb_wrong = 1; $display("WIDTH port {name} is %0d bits '
        f'wide, {each.port.bits} in the waveforms", $bits(dut.{name})); end'
        for name, each in [*layout.inputs.items(), *layout.expected.items()]
    )
    checks = "\n".join(
        f"      if ({condition}{name} !== {value}) begin tb_mismatches = tb_mismatches + 1; if (tb_mismatches <= 5) "
        f'$display("MISMATCH cycle %0d: {name} is %h, expected %h", tb_cycle, {name}, {value}); end'
        for name, each in layout.expected.items()
        for value in [each.slice_of(now, layout.digits)]
        for condition in [f"{layout.care[name].slice_of(now, layout.digits)} && " if name in layout.care else ""]
    )
    bench = f"""// {title or f"{top}: every output in every cycle against what is expected."}
`timescale 1ns/1ps
module {TESTBENCH};
  reg {clock} = 0;
  reg {reset} = {int(waveforms.reset_cycles > 0)};
  /* verilator tracing_off */
  integer tb_cycle, tb_mismatches, tb_wrong;
  reg [{4 * layout.digits - 1}:0] tb_memory [0:{waveforms.cycles - 1}];
  reg [{4 * layout.digits - 1}:0] {now} = 0;
  /* verilator tracing_on */
{driven}
{seen}
  {top} dut ({", ".join(f".{name}({name})" for name in ports)});
  always #5 {clock} = ~{clock};
  initial begin
    tb_wrong = 0;
    tb_mismatches = 0;
{widths}
    if (tb_wrong) $finish;
    if ($test$plusargs("vcd")) begin
      $dumpfile("{VCD}");
      $dumpvars(0, dut);
    end
    $readmemh("{STIMULUS}", tb_memory);
    repeat ({waveforms.reset_cycles}) @(posedge {clock});
    #1 {reset} = 0;
    for (tb_cycle = 0; tb_cycle < {waveforms.cycles}; tb_cycle = tb_cycle + 1) begin
      {now} = tb_memory[tb_cycle];
      #3;
{checks}
      @(posedge {clock});
      #1;
    end
    $display("SUMMARY %0d %0d", tb_mismatches, tb_cycle);
    $finish;
  end
endmodule
"""
    return bench, _stimulus_text(layout, waveforms.cycles)


_COCOTB = '''"""{top} against {stimulus}, cycle by cycle, with cocotb 2. Run with `python {file}` or `make`."""

import os
from pathlib import Path

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, RisingEdge, Timer

FOLDER = Path(__file__).resolve().parent
CLOCK, RESET, RESET_CYCLES = {clock!r}, {reset!r}, {reset_cycles}
# port: (first digit, digits, bits) in each line of the stimulus
INPUTS = {inputs}
# port: (first digit, digits, bits, digit that says whether the value counts in this cycle, or None)
EXPECTED = {expected}


@cocotb.test()
async def every_output_in_every_cycle(dut):
    """Drive each line after a rising edge and compare the settled outputs before the next."""
    lines = (FOLDER / "{stimulus}").read_text().split()
    clock = getattr(dut, CLOCK) if CLOCK else None
    for name in INPUTS:
        getattr(dut, name).value = 0
    if RESET:
        getattr(dut, RESET).value = int(RESET_CYCLES > 0)
    if CLOCK:
        Clock(clock, 10, unit="ns").start(start_high=False)
    for _ in range(RESET_CYCLES):
        await (RisingEdge(clock) if CLOCK else Timer(10, unit="ns"))
    if RESET:
        getattr(dut, RESET).value = 0
    wrong = []
    for cycle, line in enumerate(lines):
        for name, (first, digits, bits) in INPUTS.items():
            getattr(dut, name).value = int(line[first : first + digits], 16)
        await (FallingEdge(clock) if CLOCK else Timer(5, unit="ns"))
        for name, (first, digits, bits, care) in EXPECTED.items():
            if care is not None and line[care] == "0":
                continue
            seen, expected = str(getattr(dut, name).value), f"{{int(line[first : first + digits], 16):0{{bits}}b}}"
            if seen != expected:
                wrong.append(f"cycle {{cycle}}: {{name}} is {{seen}}, expected {{expected}}")
        await (RisingEdge(clock) if CLOCK else Timer(5, unit="ns"))
    assert not wrong, f"{{len(wrong)}} outputs differ. First: {{wrong[0]}}"


def test_{top}():
    """Build the design and run the test above; the simulator is taken from SIM (default: icarus)."""
    from cocotb_tools.check_results import get_results
    from cocotb_tools.runner import get_runner

    runner = get_runner(os.environ.get("SIM", "icarus"))
    build = FOLDER / "sim_build"
    runner.build(sources=[FOLDER / "design.v"], hdl_toplevel="{top}", build_dir=build, timescale=("1ns", "1ps"))
    results = runner.test(hdl_toplevel="{top}", test_module="{module}", test_dir=FOLDER, build_dir=build)
    tests, failures = get_results(results)
    if failures or not tests:
        raise SystemExit(f"{{failures}} of {{tests}} tests failed.")


if __name__ == "__main__":
    test_{top}()
'''
_MAKEFILE = """# cocotb 2: `make`, or `make SIM=verilator`
SIM ?= icarus
TOPLEVEL_LANG = verilog
VERILOG_SOURCES = $(CURDIR)/design.v
COCOTB_TOPLEVEL = {top}
COCOTB_TEST_MODULES = {module}
COCOTB_HDL_TIMEUNIT = 1ns
COCOTB_HDL_TIMEPRECISION = 1ps
include $(shell cocotb-config --makefiles)/Makefile.sim
"""
_README = """# {top}: {cycles} cycles of stimulus

- Icarus: `iverilog -g2005-sv -s testbench -o bench design.v testbench.v && vvp -n bench +vcd`
- Verilator 5: `verilator --binary --timing --trace -Wno-fatal -Wno-lint --top-module testbench design.v testbench.v`,
  then `obj_dir/Vtestbench +vcd`
- cocotb 2: `python {module}.py` or `make`

`SUMMARY 0 {cycles}` means that no output differed. `+vcd` writes `waveforms.vcd`.
"""


def write_testbench(folder: Path, verilog: str, top: str, waveforms: Waveforms, title: str = "") -> list[Path]:
    """Write everything to simulate module `top` of `verilog` without Bitwright into `folder`; the files written.

    `design.v`, `testbench.v` and `stimulus.hex` for any Verilog simulator; `test_<top>.py` and `Makefile` for cocotb 2
    on the same stimulus; `README.md` with the commands. Raises BitwrightError when a file cannot be written.
    """
    bench, stimulus = verilog_testbench(top, waveforms, title)
    layout = _layout(waveforms)
    inputs = {name: (each.first, each.digits, each.port.bits) for name, each in layout.inputs.items()}
    care = {name: mask.first for name, mask in layout.care.items()}
    expected = {
        name: (each.first, each.digits, each.port.bits, care.get(name)) for name, each in layout.expected.items()
    }
    module = f"test_{top}"
    test = _COCOTB.format(
        top=top, file=f"{module}.py", module=module, stimulus=STIMULUS, clock=waveforms.clock, reset=waveforms.reset,
        reset_cycles=waveforms.reset_cycles, inputs=_dictionary(inputs), expected=_dictionary(expected),
    )  # fmt: skip
    files = {
        "design.v": verilog, f"{TESTBENCH}.v": bench, STIMULUS: stimulus, f"{module}.py": test,
        "Makefile": _MAKEFILE.format(top=top, module=module),
        "README.md": _README.format(top=top, module=module, cycles=waveforms.cycles),
    }  # fmt: skip
    for name, text in files.items():
        write_whole(folder / name, text)
    return [folder / name for name in files]


def _dictionary(items: Mapping[str, tuple[int | None, ...]]) -> str:
    return "{\n" + "".join(f'    "{name}": {value},\n' for name, value in items.items()) + "}"
