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
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bitwright.core.errors import InputError, ToolError, UnknownNameError
from bitwright.core.files import write_whole
from bitwright.engine.netlist import Netlist
from bitwright.engine.testbench_files import STIMULUS, TESTBENCH, VCD, verilog_testbench, write_testbench
from bitwright.engine.waveforms import Port, SimulationResult, Waveforms, check_width, compare

if TYPE_CHECKING:
    from amaranth.hdl import Elaboratable, Signal

__all__ = [
    "CompiledSimulator", "Port", "SimulationResult", "Waveforms", "simulate_amaranth", "simulate_netlist",
    "simulate_verilog", "verilog_testbench", "write_testbench",
]  # fmt: skip

CompiledSimulator = Literal["icarus", "verilator"]
_TOOLS = {"icarus": "iverilog", "verilator": "verilator"}
# Compiling takes most of Verilator's time: for an 8 x 8 array and 5,000 cycles, -O0 is the quickest in sum.
_VERILATOR = ("--binary", "--timing", "-j", "2", "-Wno-fatal", "-Wno-lint", "-Wno-style", "--top-module", TESTBENCH,
              "-MAKEFLAGS", "OPT_FAST=-O0 OPT_SLOW=-O0 OPT_GLOBAL=-O0")  # fmt: skip
_RANDOM_START = ("+verilator+seed+1", "+verilator+rand+reset+2")  # what reset misses must show, as X in Icarus


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


def simulate_amaranth(
    design: Elaboratable, ports: Mapping[str, Signal], waveforms: Waveforms, vcd: Path | None = None
) -> SimulationResult:
    """Simulate a design of the clock domain `sync` in Python under `waveforms`; `vcd` gets the waveforms.

    `ports` maps port names to signals. The reset is driven through its signal when `ports` has one, else as the reset
    of `sync`. Registers start at their initial values, so a forgotten reset does not show here.
    Raises InputError for a port that `ports` does not have or that has another width.
    """
    from amaranth.hdl import ClockDomain, Module
    from amaranth.sim import Simulator

    widths = {name: len(port) for name, port in ports.items()}
    for each in (*waveforms.driven, *waveforms.compared):
        check_width(each, widths)
    reset = ports.get(waveforms.reset)
    whole = Module()
    if waveforms.clock and reset is None:
        whole.domains.sync = domain = ClockDomain("sync")
        reset = domain.rst if waveforms.reset else None
    whole.submodules.design = design
    inputs = [(ports[name], values.tolist()) for name, values in waveforms.inputs.items()]
    masks = [(1 << port.bits) - 1 for port in waveforms.compared]
    outputs = [ports[port.name] for port in waveforms.compared]
    seen = np.zeros((len(outputs), waveforms.cycles), np.uint64)

    async def drive(context: Any) -> None:
        async def end_cycle() -> None:
            await (context.tick() if waveforms.clock else context.delay(1e-6))

        if reset is not None and waveforms.reset_cycles:
            context.set(reset, 1)
        for _ in range(waveforms.reset_cycles):
            await end_cycle()
        if reset is not None:
            context.set(reset, 0)
        for cycle in range(waveforms.cycles):
            for port, values in inputs:
                context.set(port, values[cycle])
            for row, (port, mask) in enumerate(zip(outputs, masks, strict=True)):
                seen[row, cycle] = context.get(port) & mask
            await end_cycle()

    simulator = Simulator(whole)
    if waveforms.clock:
        simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    if vcd is None:
        simulator.run()
    else:
        with tempfile.TemporaryDirectory(prefix="bitwright-simulation-") as name:
            with simulator.write_vcd(str(Path(name) / VCD)):
                simulator.run()
            write_whole(vcd, (Path(name) / VCD).read_bytes())
    return compare("amaranth", dict(zip(waveforms.expected, seen, strict=True)), waveforms)


def simulate_netlist(netlist: Netlist, waveforms: Waveforms) -> SimulationResult:
    """Simulate a mapped netlist with zero delays under `waveforms`, the reset driven first. Flip-flops start at zero.

    Raises InputError for ports that the netlist does not have or that have another width, and as
    `gate_simulation.simulate`.
    """
    from bitwright.engine.gate_simulation import simulate

    widths = {name: len(port.nets) for name, port in netlist.ports.items()}
    for port in (*waveforms.driven, *waveforms.compared):
        check_width(port, widths)
    before = waveforms.reset_cycles
    inputs = {name: np.pad(values, (before, 0))[:, None] for name, values in waveforms.inputs.items()}
    if waveforms.reset:
        inputs[waveforms.reset] = np.repeat([1, 0], [before, waveforms.cycles])[:, None]
    outputs = simulate(netlist, inputs).outputs
    return compare("netlist", {name: outputs[name][before:, 0] for name in waveforms.expected}, waveforms)
