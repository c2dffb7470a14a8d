"""RTL against exact evaluation: cycle by cycle, on corner and random matrix products, in a simulator of choice.

`amaranth` simulates in Python (pip only; small arrays), `icarus` and `verilator` compile a generated self-checking
testbench (`testbench`). Every output is compared in every cycle, so the cycle count is checked with the results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitwright.core.errors import ToolError, UnknownNameError
from bitwright.engine.evaluate import Words, evaluate
from bitwright.engine.rtl import TOP, generate, reset_cycles, simulation_design
from bitwright.engine.systolic import SystolicArray, cycles

Simulator = Literal["amaranth", "icarus", "verilator"]
_TOOLS = {"icarus": "iverilog", "verilator": "verilator"}


@dataclass(frozen=True)
class Stimulus:
    """Ports per cycle, (cycles,) or (cycles, ports): what is driven and what must be seen (results where valid)."""

    valid: NDArray[np.bool_]
    last: NDArray[np.bool_]
    a: Words
    b: Words
    ready: NDArray[np.bool_]
    done: NDArray[np.bool_]
    result_valid: NDArray[np.bool_]
    result: Words


@dataclass(frozen=True)
class VerificationReport:
    """`vectors` operand steps of `products` matrix products simulated over `cycles` cycles.

    `mismatches` counts wrong outputs; `first_mismatch` describes the first ("" when there is none).
    """

    simulator: str
    products: int
    vectors: int
    cycles: int
    mismatches: int
    first_mismatch: str

    @property
    def passed(self) -> bool:
        """No output differed in any cycle."""
        return self.mismatches == 0


def verify(
    array: SystolicArray, seed: int = 0, vectors: int = 3000, simulator: Simulator | None = None, timeout_s: float = 600
) -> VerificationReport:
    """Simulate the generated hardware on corner and random products of at least `vectors` operand steps.

    Without `simulator`: Icarus when installed, else Amaranth's. Operand gaps, ignored inputs and back-to-back tiles
    are part of the stimulus. Raises ToolError when the simulator is missing, fails, or takes longer than `timeout_s`.
    """
    if simulator is None:
        simulator = "icarus" if shutil.which("iverilog") else "amaranth"
    if simulator not in ("amaranth", *_TOOLS):
        raise UnknownNameError("simulator", simulator, ("amaranth", *_TOOLS))
    rng = np.random.default_rng(seed)
    products = matrix_products(array, rng, vectors)
    parts = [stimulus(array, a, b, rng, gaps=index % 3 == 2) for index, (a, b) in enumerate(products)]
    total = Stimulus(*(np.concatenate([getattr(part, name) for part in parts]) for name in Stimulus.__annotations__))
    steps = int((total.valid & total.ready).sum())
    run = _amaranth if simulator == "amaranth" else _compiled
    mismatches, first = run(array, total, simulator, timeout_s)
    return VerificationReport(simulator, len(products), steps, len(total.valid), mismatches, first)


def matrix_products(array: SystolicArray, rng: np.random.Generator, vectors: int) -> list[tuple[Words, Words]]:
    """Extreme operands in every combination, shapes that do not fill the array, then random ones."""
    rows, columns = array.rows, array.columns
    low_a, high_a = -(1 << (array.a_bits - 1)), (1 << (array.a_bits - 1)) - 1
    low_b, high_b = -(1 << (array.b_bits - 1)), (1 << (array.b_bits - 1)) - 1
    products = [
        (np.full((rows, 5), a, np.int64), np.full((5, columns), b, np.int64))
        for a in (low_a, high_a) for b in (low_b, high_b)
    ]  # fmt: skip
    shapes = [(1, 1, 1), (rows + 1, 3, columns), (rows, 1, 2 * columns + 1), (2 * rows - 1, 7, columns + 2)]
    steps = 20
    while shapes or steps < vectors:
        m, k, n = shapes.pop() if shapes else (
            int(rng.integers(1, 2 * rows + 1)), int(rng.integers(1, 65)), int(rng.integers(1, 2 * columns + 1))
        )  # fmt: skip
        products.append((rng.integers(low_a, high_a + 1, (m, k)), rng.integers(low_b, high_b + 1, (k, n))))
        steps += -(-m // rows) * -(-n // columns) * k
    return products


def stimulus(array: SystolicArray, a: Words, b: Words, rng: np.random.Generator, gaps: bool = False) -> Stimulus:
    """Drive one product and say what every output must show. With `gaps`, cycles without `valid` among the operands."""
    rows, columns = array.rows, array.columns
    expected = evaluate(array, a, b)
    expected = np.pad(expected, ((0, -a.shape[0] % rows), (0, -b.shape[1] % columns)))
    a = np.pad(a, ((0, -a.shape[0] % rows), (0, 0)))
    b = np.pad(b, ((0, 0), (0, -b.shape[1] % columns)))
    steps = np.arange(a.shape[1])
    if gaps:  # an idle cycle before a step, but never after the last one
        steps = np.cumsum(1 + rng.integers(0, 2, a.shape[1])) - 1
    length = int(steps[-1]) + 1
    total = int(cycles(array, a.shape[0], b.shape[1], length))
    noise = _noise(array, rng, total)
    tiles = [(top, left) for top in range(0, a.shape[0], rows) for left in range(0, b.shape[1], columns)]
    for tile, (top, left) in enumerate(tiles):
        start = tile * (length + rows)
        noise.valid[start : start + length] = False
        noise.valid[start + steps] = True
        noise.last[start : start + length] &= ~noise.valid[start : start + length]
        noise.last[start + length - 1] = True
        noise.a[start + steps] = a[top : top + rows].T
        noise.b[start + steps] = b[:, left : left + columns]
        noise.ready[start + length : start + length + rows] = False
        for column in range(columns):
            first = start + length + rows + column + 1
            noise.result_valid[first : first + rows, column] = True
            noise.result[first : first + rows, column] = expected[top : top + rows, left + column][::-1]
        noise.done[start + length + rows + columns + rows - 1] = True
    end = len(tiles) * (length + rows)
    noise.valid[end:] = False
    return noise


def _noise(array: SystolicArray, rng: np.random.Generator, total: int) -> Stimulus:
    """Random inputs everywhere: what the array must ignore while it is not ready or `valid` is 0; no outputs yet."""
    shape = (total, array.columns)
    return Stimulus(
        rng.integers(0, 2, total).astype(bool), rng.integers(0, 2, total).astype(bool),
        rng.integers(-(1 << (array.a_bits - 1)), 1 << (array.a_bits - 1), (total, array.rows)),
        rng.integers(-(1 << (array.b_bits - 1)), 1 << (array.b_bits - 1), shape),
        np.ones(total, bool), np.zeros(total, bool), np.zeros(shape, bool), np.zeros(shape, np.int64),
    )  # fmt: skip


def _amaranth(array: SystolicArray, stimulus: Stimulus, simulator: str, timeout_s: float) -> tuple[int, str]:
    from amaranth.sim import Simulator as AmaranthSimulator

    design, ports = simulation_design(array)
    found: list[str] = []

    async def drive(context: Any) -> None:
        for cycle in range(len(stimulus.valid)):
            context.set(ports["valid"], int(stimulus.valid[cycle]))
            context.set(ports["last"], int(stimulus.last[cycle]))
            for row in range(array.rows):
                context.set(ports[f"a_{row}"], int(stimulus.a[cycle, row]))
            for column in range(array.columns):
                context.set(ports[f"b_{column}"], int(stimulus.b[cycle, column]))
            expected = {"ready": int(stimulus.ready[cycle]), "done": int(stimulus.done[cycle])}
            expected["result_valid"] = sum(1 << j for j in range(array.columns) if stimulus.result_valid[cycle, j])
            for column in np.flatnonzero(stimulus.result_valid[cycle]).tolist():
                expected[f"result_{column}"] = int(stimulus.result[cycle, column])
            for port, value in expected.items():
                if (seen := context.get(ports[port])) != value:
                    found.append(f"cycle {cycle}: {port} is {seen}, expected {value}")
            await context.tick()

    run = AmaranthSimulator(design)
    run.add_clock(1e-6)
    run.add_testbench(drive)
    run.run()
    return len(found), found[0] if found else ""


def _compiled(array: SystolicArray, stimulus: Stimulus, simulator: str, timeout_s: float) -> tuple[int, str]:
    if shutil.which(_TOOLS[simulator]) is None:
        raise ToolError(f"{_TOOLS[simulator]} is not installed. Install it, or use the simulator 'amaranth'.")
    with tempfile.TemporaryDirectory(prefix="bitwright-simulation-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "array.v").write_text(generate(array))
        bench, data = testbench(array, stimulus)
        (folder / "testbench.v").write_text(bench)
        (folder / "stimulus.hex").write_text(data)
        if simulator == "icarus":
            commands = [["iverilog", "-g2005-sv", "-o", "bench", "array.v", "testbench.v"], ["vvp", "-n", "bench"]]
        else:
            flags = ["--binary", "--timing", "-Wno-fatal", "-Wno-lint", "-Wno-style", "--top-module", "testbench"]
            commands = [["verilator", *flags, "-o", "bench", "array.v", "testbench.v"], ["obj_dir/bench"]]
        output = ""
        for command in commands:
            output = _run(command, folder, timeout_s)
    lines = [line for line in output.splitlines() if line.startswith("MISMATCH")]
    summary = [line.split() for line in output.splitlines() if line.startswith("SUMMARY")]
    if len(summary) != 1:
        raise ToolError(f"The {simulator} simulation ended without a result:\n{output[-1000:]}")
    return int(summary[0][1]), lines[0].removeprefix("MISMATCH ") if lines else ""


def _run(command: Sequence[str], folder: Path, timeout_s: float) -> str:
    executable = str(folder / command[0]) if "/" in command[0] else command[0]
    environment = {**os.environ, "TMPDIR": str(folder)}
    try:
        done = subprocess.run(
            [executable, *command[1:]], cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command[0]} did not finish within {timeout_s:g} s; use fewer vectors.") from error
    except OSError as error:
        raise ToolError(f"Cannot start {command[0]}: {error.strerror or error}.") from error
    if done.returncode != 0:
        raise ToolError(f"{command[0]} failed (status {done.returncode}):\n{(done.stderr or done.stdout)[-1500:]}")
    return done.stdout


def testbench(array: SystolicArray, stimulus: Stimulus) -> tuple[str, str]:
    """A self-checking Verilog testbench for `systolic_array` and the file `stimulus.hex` that it reads.

    It prints `MISMATCH ...` for the first differing cycles and `SUMMARY <mismatching outputs> <cycles>` at the end.
    """
    rows, columns, width = array.rows, array.columns, array.accumulator_bits
    fields = [("result_valid", columns), ("done", 1), ("ready", 1), ("last", 1), ("valid", 1)]
    fields += [(f"result_{column}", width) for column in range(columns)]
    fields += [(f"b_{column}", array.b_bits) for column in range(columns)]
    fields += [(f"a_{row}", array.a_bits) for row in range(rows)]
    offset, slices = 0, {}
    for name, bits in fields:
        slices[name] = f"now[{offset + bits - 1}:{offset}]"
        offset += bits
    inputs = ["valid", "last", *(f"a_{row}" for row in range(rows)), *(f"b_{column}" for column in range(columns))]
    outputs = ["ready", "done", "result_valid", *(f"result_{column}" for column in range(columns))]
    sizes = dict(fields)
    declared = "\n".join(f"  wire [{sizes[name] - 1}:0] {name};" for name in outputs)
    ports = ", ".join([".clk(clk)", ".rst(rst)"] + [
        f".{name}({f'rst ? {sizes[name]}{chr(39)}d0 : {slices[name]}' if name in inputs else name})"
        for name in inputs + outputs
    ])  # fmt: skip
    checks = "\n".join(
        f"      if ({condition}{name} !== {slices[name]}) begin mismatches = mismatches + 1; if (mismatches <= 5) "
        f'$display("MISMATCH cycle %0d: {name} is %h, expected %h", cycle, {name}, {slices[name]}); end'
        for name in outputs
        for condition in [f"result_valid[{name[7:]}] && " if name[7:].isdigit() else ""]
    )
    total = len(stimulus.valid)
    bench = f"""// {rows} x {columns} {array.processing_element}: all outputs in all cycles against exact evaluation.
`timescale 1ns/1ps
module testbench;
  reg clk = 0;
  reg rst = 1;
  integer cycle, mismatches;
  reg [{offset - 1}:0] memory [0:{total - 1}];
  reg [{offset - 1}:0] now = 0;
{declared}
  {TOP} dut ({ports});
  always #5 clk = ~clk;
  initial begin
    $readmemh("stimulus.hex", memory);
    mismatches = 0;
    repeat ({reset_cycles(array)}) @(posedge clk);
    #1 rst = 0;
    for (cycle = 0; cycle < {total}; cycle = cycle + 1) begin
      now = memory[cycle];
      #3;
{checks}
      @(posedge clk);
      #1;
    end
    $display("SUMMARY %0d %0d", mismatches, cycle);
    $finish;
  end
endmodule
"""
    return bench, _hexadecimal(stimulus, fields)


def _hexadecimal(stimulus: Stimulus, fields: Sequence[tuple[str, int]]) -> str:
    """One line per cycle: the fields, the first in the lowest bits."""
    columns: list[tuple[list[int], int]] = []
    for name, bits in fields:
        base, _, index = name.rpartition("_")
        if name == "result_valid":
            weights = [1 << j for j in range(stimulus.result_valid.shape[1])]
            column = [
                sum(w for w, on in zip(weights, row, strict=True) if on) for row in stimulus.result_valid.tolist()
            ]
        elif index.isdigit():
            column = getattr(stimulus, base)[:, int(index)].tolist()
        else:
            column = getattr(stimulus, name).astype(int).tolist()
        columns.append((column, bits))
    lines = []
    for cycle in range(len(stimulus.valid)):
        word = position = 0
        for column, bits in columns:
            word |= (column[cycle] & ((1 << bits) - 1)) << position
            position += bits
        lines.append(f"{word:x}")
    return "\n".join(lines) + "\n"
