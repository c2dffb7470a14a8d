"""Any hardware against expected waveforms: Verilog, Amaranth designs and mapped netlists, every cycle compared.

`Waveforms` say what every input is driven with and what every output must show, cycle by cycle. `simulate_verilog`
compiles a generated self-checking testbench with Icarus or Verilator, `simulate_amaranth` needs nothing but Python,
`simulate_netlist` runs the cells after synthesis. All drive the inputs at the start of a cycle and compare the settled
outputs before the clock edge that ends it, and describe mismatches alike. `write_testbench` leaves the Verilog
testbench and a cocotb test of the same stimulus to the user.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import InputError, ToolError, UnknownNameError
from bitwright.core.files import write_whole
from bitwright.engine.netlist import Netlist

if TYPE_CHECKING:
    from amaranth.hdl import Elaboratable, Signal

CompiledSimulator = Literal["icarus", "verilator"]
TESTBENCH, STIMULUS, VCD = "testbench", "stimulus.hex", "waveforms.vcd"
_TOOLS = {"icarus": "iverilog", "verilator": "verilator"}
_NAME = re.compile(r"(?!tb_|dut$|testbench$)[A-Za-z_]\w*")
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
# The C++ compiler takes most of Verilator's time. -O1 is the quickest in sum for arrays of this size and length.
_VERILATOR = ("--binary", "--timing", "-j", "2", "-Wno-fatal", "-Wno-lint", "-Wno-style", "--top-module", TESTBENCH,
              "-MAKEFLAGS", "OPT_FAST=-O1 OPT_SLOW=-O0 OPT_GLOBAL=-O1")  # fmt: skip
_RANDOM_START = ("+verilator+seed+1", "+verilator+rand+reset+2")  # what reset misses must show, as X in Icarus


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


def simulate_verilog(
    verilog: str,
    top: str,
    waveforms: Waveforms,
    simulator: CompiledSimulator = "icarus",
    timeout_s: float = 600,
    vcd: Path | None = None,
) -> SimulationResult:
    """Simulate module `top` of `verilog` under `waveforms`, compiled in a temporary folder; `vcd` gets the waveforms.

    All inputs of `top` must be driven. Registers without reset start unknown (Icarus) or random (Verilator).
    Raises InputError when a port's width differs from the design's, ToolError when the simulator is missing, cannot
    compile the design, fails, or takes longer than `timeout_s` in all.
    """
    if simulator not in _TOOLS:
        raise UnknownNameError("simulator", simulator, _TOOLS)
    if shutil.which(_TOOLS[simulator]) is None:
        raise ToolError(f"{_TOOLS[simulator]} is not installed. Install it, or simulate with Amaranth.")
    plus = ["+vcd"] if vcd else []
    if simulator == "icarus":
        commands = [["iverilog", "-g2005-sv", "-s", TESTBENCH, "-o", "bench", "design.v", "testbench.v"],
                    ["vvp", "-n", "bench", *plus]]  # fmt: skip
    else:
        trace = ["--trace"] if vcd else []
        commands = [["verilator", *_VERILATOR, *trace, "-o", "bench", "design.v", "testbench.v"],
                    ["obj_dir/bench", *_RANDOM_START, *plus]]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bitwright-simulation-", ignore_cleanup_errors=True) as name:
        folder, end_s = Path(name), time.monotonic() + timeout_s
        bench, stimulus = verilog_testbench(top, waveforms)
        for file, text in (("design.v", verilog), ("testbench.v", bench), (STIMULUS, stimulus)):
            (folder / file).write_text(text)
        output = ""
        for command in commands:
            output = _run(command, folder, end_s, timeout_s)
        result = _read_output(output, simulator, waveforms)
        if vcd is not None:
            write_whole(vcd, (folder / VCD).read_bytes())
    return result


def _read_output(output: str, simulator: str, waveforms: Waveforms) -> SimulationResult:
    lines = output.splitlines()
    for line in lines:
        if line.startswith("WIDTH "):
            raise InputError(f"The waveforms do not fit the design: {line.removeprefix('WIDTH ')}.")
    summary = [line.split() for line in lines if line.startswith("SUMMARY ")]
    if len(summary) != 1 or int(summary[0][2]) != waveforms.cycles:
        raise ToolError(f"The {simulator} simulation ended without a result:\n{output[-1000:]}")
    first = next((line.removeprefix("MISMATCH ") for line in lines if line.startswith("MISMATCH ")), "")
    return SimulationResult(simulator, waveforms.cycles, int(summary[0][1]), first)


def _run(command: Sequence[str], folder: Path, end_s: float, timeout_s: float) -> str:
    """Standard output of a command; at `end_s` (monotonic) it is ended with all processes it started."""
    executable = str(folder / command[0]) if "/" in command[0] else command[0]
    try:
        process = subprocess.Popen(
            [executable, *command[1:]], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise ToolError(f"Cannot start {command[0]}: {error.strerror or error}.") from error
    with process:
        try:
            output, errors = process.communicate(timeout=max(0.0, end_s - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"{command[0]} did not finish within {timeout_s:g} s; use fewer cycles.") from error
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        raise ToolError(f"{command[0]} failed (status {process.returncode}):\n{(errors or output)[-1500:]}")
    return output


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
    fields = [*layout.inputs.values(), *layout.expected.values(), *{id(mask): mask for mask in layout.care.values()}.values()]
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
