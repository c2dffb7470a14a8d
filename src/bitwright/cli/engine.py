"""`bitwright engine`: generate, verify, synthesise and count a tensor engine, and transform loop nests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from bitwright.cli.main import app, show, table
from bitwright.core.errors import BitwrightError, InputError
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.engine.transformations import SEQUENCES, TRANSFORMATIONS

commands = typer.Typer(
    help="Tensor engines: a loop nest, its transformations, cycles, RTL, verification, gates.", no_args_is_help=True
)
app.add_typer(commands, name="engine")

Dataflow = Annotated[
    str, typer.Option("--dataflow", "-d", help="os, ws (systolic), cube, tree or matrix2d: the baseline's loop nest.")
]
Rows = Annotated[
    int | None,
    typer.Option(
        help="Positions along M: 16 by default, 4 in a cube, 1 in ws and tree. A serial engine has a column of "
        "elements for each."
    ),
]
Columns = Annotated[int, typer.Option(help="Positions along N.")]
Depth = Annotated[
    int | None, typer.Option(help="Positions along K: 16 by default in ws and tree, 4 in a cube, else 1.")
]
Transform = Annotated[
    list[str],
    typer.Option(
        "--transform",
        "-t",
        help=f"A named sequence ({', '.join(SEQUENCES)}), or one of {', '.join(TRANSFORMATIONS)} with its arguments, "
        "such as 'pipeline pp'. Repeatable, in order.",
    ),
]
EncodingName = Annotated[str, typer.Option("--encoding", "-e", help="Digits of A: mbe, ent, csd, twos-complement, ...")]
Multiplier = Annotated[
    str,
    typer.Option(help="booth; tool: a product left to the synthesis tool; or a product of number-format codes, as "
                 "fp8_e4m3, int8\\*uint4, int8\\*shift3, ovp4, lmul_e4m3."),
]  # fmt: skip
ABits = Annotated[int, typer.Option(help="Width of A, the operand that is encoded.")]
BBits = Annotated[int, typer.Option(help="Width of B.")]
AccumulatorBits = Annotated[int, typer.Option(help="Width of the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_LIBRARIES = "predictive-28nm, -45nm, -180nm, osu018, or a Liberty file."


def _engine(
    dataflow: str, rows: int | None, columns: int, depth: int | None, transform: list[str], encoding: str,
    multiplier: str, a_bits: int, b_bits: int, accumulator_bits: int, most: int = 1024,
) -> TensorEngine:  # fmt: skip
    """The engine that the options describe; what they leave open has the default shape, no side above `most`."""
    from bitwright.study.file import engine_shape

    if multiplier != "booth" and encoding != "mbe":
        raise InputError(
            f"--multiplier {multiplier} has no digits, so encoding {encoding!r} changes nothing: leave one out."
        )
    shape = engine_shape(dataflow, None, None)
    return TensorEngine(
        min(shape[0], most) if rows is None else rows, columns, tuple(transform), dataflow,
        min(shape[1], most) if depth is None else depth, a_bits, b_bits, accumulator_bits, encoding, multiplier,
    )  # fmt: skip


@commands.command()
def generate(
    dataflow: Dataflow = "os", rows: Rows = None, columns: Columns = 16, depth: Depth = None,
    transform: Transform = [], encoding: EncodingName = "mbe", multiplier: Multiplier = "booth",  # noqa: B006
    a_bits: ABits = 8, b_bits: BBits = 8, accumulator_bits: AccumulatorBits = 32,
    nest: Annotated[bool, typer.Option("--nest", help="Print the loop nest instead of Verilog.")] = False,
    part: Annotated[str, typer.Option(help="Only this module: pe, chain_element, digit_stream, output_stage.")] = "",
    testbench: Annotated[
        Path | None,
        typer.Option(help="Write the design, a self-checking Verilog testbench and a cocotb test into this folder."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the text here.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Generate the Verilog of a tensor engine, print its loop nest, or write a testbench for your own simulator.

    Example: `bitwright engine generate -d cube --rows 4 --columns 4 --depth 4 -t opt1 -o engine.v`

    A transformation that is not legal stops with the rule it breaks and the nest before it.
    """
    from bitwright.engine import rtl
    from bitwright.engine.notation import print_nest

    if nest + bool(part) + bool(testbench) > 1:
        raise InputError("Give one of --nest, --part and --testbench.")
    engine = _engine(
        dataflow, rows, columns, depth, transform, encoding, multiplier, a_bits, b_bits, accumulator_bits
    )  # fmt: skip
    if testbench:
        _testbench(engine, testbench, as_json)
        return
    text = print_nest(engine.nest) if nest else rtl.generate_part(engine, part) if part else rtl.generate(engine)
    _print(text, "nest" if nest else "verilog", output, as_json)


def _print(text: str, kind: str, output: Path | None, as_json: bool) -> None:
    from bitwright.core.files import write_whole

    if output:
        write_whole(output, text)
    data = {kind: text, "written": str(output) if output else None}
    shown = f"Written: {output}" if output else text.rstrip("\n")
    show(data, as_json, lambda out: out.print(shown, highlight=False, markup=False, soft_wrap=True))


def _testbench(engine: TensorEngine, folder: Path, as_json: bool) -> None:
    from bitwright.engine.rtl import TOP, generate
    from bitwright.engine.testbench_files import write_testbench
    from bitwright.engine.verify import random_stimulus

    driven = random_stimulus(engine, 0, 300)
    title = f"{engine.dataflow} {engine.rows}x{engine.columns}x{engine.depth}, {engine.nest.name}"
    written = write_testbench(folder, generate(engine), TOP, driven.waveforms, f"{title}: {driven.products} products")
    data = {"written": [str(path) for path in written], "products": driven.products, "cycles": driven.cycles}
    text = f"{driven.products} products in {driven.cycles:,} cycles. Written: {', '.join(map(str, written))}"
    show(data, as_json, lambda out: out.print(text, highlight=False, markup=False, soft_wrap=True))


@commands.command()
def transform(
    nest: Annotated[Path, typer.Argument(help="A loop nest in its text notation; - reads standard input.")],
    transform: Transform = [],  # noqa: B006
    k: Annotated[
        int | None, typer.Option("--sum-length", "-k", min=1, help="Also check that the states hold sums over this K.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the nest here.")] = None,
    as_json: Json = False,
) -> None:
    """Apply transformations to a loop nest of your own and print the result; without any, check it.

    Example: `bitwright engine transform mac.txt -t "retime_add p" -t "retime_add acc"`

    A nest to start from: `bitwright engine generate --nest -o mac.txt`
    """
    from bitwright.engine.legality import check
    from bitwright.engine.notation import parse_nest, print_nest
    from bitwright.engine.transformations import apply

    try:
        text = sys.stdin.read() if str(nest) == "-" else nest.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the nest {nest}: {getattr(error, 'strerror', None) or error}.") from None
    given = parse_nest(text)
    check(given)
    made = apply(given, *transform)
    if k is not None:
        check(made, k)
    _print(print_nest(made), "nest", output, as_json)


@commands.command()
def cycles(
    m: Annotated[int, typer.Argument(help="Rows of A and of the result.")],
    n: Annotated[int, typer.Argument(help="Columns of B and of the result.")],
    k: Annotated[int, typer.Argument(help="Columns of A, rows of B.")],
    dataflow: Dataflow = "os", rows: Rows = None, columns: Columns = 16, depth: Depth = None,
    transform: Transform = [], encoding: EncodingName = "mbe", multiplier: Multiplier = "booth",  # noqa: B006
    a_bits: ABits = 8, b_bits: BBits = 8, accumulator_bits: AccumulatorBits = 32,
    sigma: Annotated[
        float | None,
        typer.Option(help="Serial engines: deviation of normal integers; default: the largest of a million fills the "
                     "range."),
    ] = None,
    convention: Annotated[
        Literal["overlapped-drain", "scale-sim"], typer.Option(help="What our RTL takes, or SCALE-Sim's count.")
    ] = "overlapped-drain",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Cycles and utilisation of one matrix product (m, k) x (k, n) on an engine, operands always ready.

    Example: `bitwright engine cycles 512 576 192 --rows 16 --columns 16 -t opt4e -e ent --sigma 20`

    Of serial engines (opt3, opt4c, opt4e) the count is what normally distributed operands are expected to take, the
    operand encoded that takes fewer.
    """
    from bitwright.engine.digit_profiles import normal_profile
    from bitwright.engine.expected_cycles import expected_array_cycles
    from bitwright.engine.legality import check
    from bitwright.engine.mapping import serial_figures
    from bitwright.engine.tensor_engine import cycles as count
    from bitwright.engine.tensor_engine import utilisation
    from bitwright.engine.widths import check_depth

    engine = _engine(
        dataflow, rows, columns, depth, transform, encoding, multiplier, a_bits, b_bits, accumulator_bits
    )  # fmt: skip
    check_depth(engine.nest, k)
    check(engine.nest, k)
    if engine.serial:
        if convention != "overlapped-drain":
            raise InputError("SCALE-Sim has no serial engines; use the convention overlapped-drain.")
        figures = serial_figures(engine)
        profile = normal_profile(sigma, encoding, a_bits, figures.group)
        expected = expected_array_cycles(
            profile, m, n, k, figures.columns, figures.rows, figures.lanes, None, figures.pass_overhead
        )
        total, busy, evidence = expected.cycles + figures.start_cycles, expected.utilisation, "predicted"
        source = f"{profile.origin}: {profile.issue_cycles:.2f} cycles per multiply-accumulate of a digit stream"
    else:
        if sigma is not None:
            raise InputError("--sigma is for serial engines: the cycles of this one do not depend on the data.")
        total, busy = float(count(engine, m, n, k, convention)), float(utilisation(engine, m, n, k, convention))
        evidence, source = "simulated", f"closed form, {convention}"
    data = {"cycles": total, "utilisation": busy, "evidence": evidence, "source": source}
    text = f"{total:,.0f} cycles, utilisation {busy:.1%} [{evidence}; {source}]"
    show(data, as_json, lambda out: out.print(text, highlight=False, markup=False, soft_wrap=True))


@commands.command()
def verify(
    dataflow: Dataflow = "os", rows: Rows = None, columns: Columns = 4, depth: Depth = None,
    transform: Transform = [], encoding: EncodingName = "mbe", multiplier: Multiplier = "booth",  # noqa: B006
    a_bits: ABits = 8, b_bits: BBits = 8, accumulator_bits: AccumulatorBits = 32,
    vectors: Annotated[
        int | None, typer.Option(min=1, help="Operand steps to simulate; default 3000, of a netlist 300.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random operands.")] = 0,
    simulator: Annotated[
        Literal["amaranth", "icarus", "verilator"] | None,
        typer.Option(help="Default: Icarus when installed, else Amaranth's."),
    ] = None,
    vcd: Annotated[Path | None, typer.Option(help="Write the waveforms here, for GTKWave or Surfer.")] = None,
    netlist: Annotated[
        str, typer.Option(help=f"Map to this cell library and simulate the gates instead: {_LIBRARIES}")
    ] = "",
    formal: Annotated[bool, typer.Option("--formal", help="Also prove the element's arithmetic (SAT).")] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="With --formal: prove it undivided too, some minutes.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Simulate the RTL against the exact evaluation, cycle by cycle; optionally prove the element's arithmetic.

    Example: `bitwright engine verify -d tree --columns 4 --depth 4 -t opt1 --vcd waves.vcd`

    With `--netlist osu018` the gates after synthesis are simulated instead of the RTL.
    """
    from bitwright.core.progress import progress
    from bitwright.engine import formal as proofs
    from bitwright.engine import verify as simulation
    from bitwright.engine.libraries import find_library

    if netlist and (simulator or vcd):
        raise InputError("--netlist simulates gates with its own simulator, without waveforms: leave out --simulator, "
                         "--vcd.")  # fmt: skip
    engine = _engine(
        dataflow, rows, columns, depth, transform, encoding, multiplier, a_bits, b_bits, accumulator_bits, most=4
    )  # fmt: skip
    if whole and not formal:
        raise InputError("--whole says how far a proof goes: give --formal too.")
    if formal:
        proofs.check_provable(engine, whole)
    with progress("Verifying", 1 + formal) as advance:
        if netlist:
            report = simulation.verify_netlist(engine, find_library(netlist), seed, vectors or 300)
        else:
            report = simulation.verify(engine, seed, vectors or 3000, simulator, vcd=vcd)
        advance(1)
        proof = proofs.formal_equivalence(engine, whole) if formal else None
        advance(int(formal))
    data = {**vars(report), "passed": report.passed}
    if proof:
        data["formal"] = {"proved": list(proof.proved), "refuted": dict(proof.refuted)}

    def render(out: Console) -> None:
        verdict = (
            "equal in every cycle"
            if report.passed
            else f"{report.mismatches} MISMATCHES, first: {report.first_mismatch}"
        )
        out.print(
            f"{report.simulator}: {report.products} products, {report.vectors:,} operand steps, {report.cycles:,} "
            f"cycles: {verdict}",
            highlight=False,
            markup=False,
        )
        if proof:
            out.print(f"proved: {', '.join(proof.proved) or 'nothing'}", highlight=False)
            for name in proof.refuted:
                out.print(f"REFUTED: {name}", highlight=False)

    show(data, as_json, render)
    if not report.passed or (proof and not proof.passed):
        raise BitwrightError("The hardware does not do what its description says.")


@commands.command()
def synthesise(
    dataflow: Dataflow = "os", rows: Rows = None, columns: Columns = 16, depth: Depth = None,
    transform: Transform = [], encoding: EncodingName = "mbe", multiplier: Multiplier = "booth",  # noqa: B006
    a_bits: ABits = 8, b_bits: BBits = 8, accumulator_bits: AccumulatorBits = 32,
    library: Annotated[str, typer.Option("--library", "-l", help=_LIBRARIES)] = "predictive-28nm",
    objective: Annotated[
        Literal["area_delay", "area", "delay"], typer.Option(help="What to keep the best of.")
    ] = "area_delay",
    energy: Annotated[
        bool, typer.Option("--energy", help="Also simulate the gates on normal operands: energy per MAC.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Map an engine to the gates of a cell library: area, maximum frequency, leakage, and (`--energy`) energy.

    Example: `bitwright engine synthesise --rows 8 --columns 8 -t opt4c -e ent --library predictive-45nm --energy`
    """
    from bitwright.core.quantity import format_value
    from bitwright.engine.engine_gates import engine_gates, synthesise_engine
    from bitwright.engine.libraries import find_library
    from bitwright.engine.rtl import TOP

    engine = _engine(
        dataflow, rows, columns, depth, transform, encoding, multiplier, a_bits, b_bits, accumulator_bits
    )  # fmt: skip
    cells = find_library(library)
    report = synthesise_engine(engine, cells, objective)
    gates = engine_gates(engine, cells, objective) if energy else None
    parts = {**report.parts, TOP: report.glue}
    instances = {**report.instances, TOP: 1}
    data = {
        "library": report.glue.library,
        "tool": report.glue.tool,
        "evidence": "synthesised",
        "area_um2": report.area_um2,
        "frequency_hz": 1 / report.period_s,
        "leakage_w": report.leakage_w,
        "energy": {
            "evidence": "simulated",
            "operands": "normal",
            "energy_j_per_mac": gates.energy_j_per_mac,
            "macs_per_cycle": gates.macs_per_cycle,
            "clock_hz": 1 / gates.period_s,
        }
        if gates
        else None,
        "parts": {
            name: {
                "instances": instances[name],
                "area_um2": part.area_um2,
                "sequential_area_um2": part.sequential_area_um2,
                "maximum_frequency_hz": part.maximum_frequency_hz,
                "recipe": part.recipe,
                "cells": dict(part.cells),
            }
            for name, part in parts.items()
        },
    }

    def render(out: Console) -> None:
        rows_shown = [
            [
                name,
                str(instances[name]),
                f"{part.area_um2:,.1f}",
                f"{part.sequential_area_um2 / part.area_um2:.0%}" if part.area_um2 else "-",
                format_value(part.maximum_frequency_hz, "Hz") if part.maximum_frequency_hz else "-",
                part.recipe,
            ]
            for name, part in parts.items()
        ]
        columns_shown = ["module", "instances", "area (um2)", "registers", "max frequency", "recipe kept"]
        out.print(table(f"{report.glue.library} cells, {report.glue.tool}", columns_shown, rows_shown, (1, 2, 3, 4)))
        out.print(
            f"Engine: {report.area_um2:,.0f} um2, {format_value(1 / report.period_s, 'Hz')}, leakage "
            f"{format_value(report.leakage_w, 'W')} [synthesised, before placement]",
            highlight=False,
            markup=False,
        )
        if gates:
            out.print(
                f"Normal operands: {format_value(gates.energy_j_per_mac, 'J')} per multiply-accumulate, leakage "
                f"included, at {gates.macs_per_cycle:,.1f} per cycle [simulated gate activity]",
                highlight=False,
                markup=False,
            )

    show(data, as_json, render)
