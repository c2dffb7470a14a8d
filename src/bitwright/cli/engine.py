"""`bitwright engine`: generate, verify and synthesise a tensor engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from bitwright.cli.main import app, show, table
from bitwright.core.errors import BitwrightError
from bitwright.engine.systolic import SystolicArray

commands = typer.Typer(help="Tensor engines: RTL, verification, gates.", no_args_is_help=True)
app.add_typer(commands, name="engine")

Rows = Annotated[int, typer.Option(help="Rows of processing elements.")]
Columns = Annotated[int, typer.Option(help="Columns of processing elements.")]
Element = Annotated[
    str, typer.Option("--processing-element", "-p", help="multiply-accumulate or compressed-accumulation.")
]
Multiplier = Annotated[str, typer.Option(help="booth, or tool: a product left to the synthesis tool.")]
OperandBits = Annotated[int, typer.Option(help="Width of both operands.")]
AccumulatorBits = Annotated[int, typer.Option(help="Width of the accumulator.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _array(
    rows: int, columns: int, element: str, multiplier: str, operand_bits: int, accumulator_bits: int
) -> SystolicArray:
    return SystolicArray(
        rows=rows,
        columns=columns,
        processing_element=element,
        a_bits=operand_bits,
        b_bits=operand_bits,
        accumulator_bits=accumulator_bits,
        multiplier=multiplier,
    )


@commands.command()
def generate(
    rows: Rows = 16, columns: Columns = 16, processing_element: Element = "multiply-accumulate",
    multiplier: Multiplier = "booth", operand_bits: OperandBits = 8, accumulator_bits: AccumulatorBits = 32,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the Verilog here.")] = None,
    nest: Annotated[bool, typer.Option("--nest", help="Print the loop nest instead of Verilog.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Generate the Verilog of an output-stationary systolic array, or print its loop nest.

    Example: `bitwright engine generate --rows 8 --columns 8 -p compressed-accumulation -o array.v`
    """
    from bitwright.core.files import write_whole
    from bitwright.engine import rtl
    from bitwright.engine.nest import pretty

    array = _array(rows, columns, processing_element, multiplier, operand_bits, accumulator_bits)
    text = pretty(array.nest) if nest else rtl.generate(array)
    if output:
        write_whole(output, text)
    data = {"nest" if nest else "verilog": text, "written": str(output) if output else None}
    show(data, as_json, lambda out: out.print(f"Written: {output}" if output else text, highlight=False, markup=False))


@commands.command()
def verify(
    rows: Rows = 4, columns: Columns = 4, processing_element: Element = "multiply-accumulate",
    multiplier: Multiplier = "booth", operand_bits: OperandBits = 8, accumulator_bits: AccumulatorBits = 32,
    vectors: Annotated[int, typer.Option(help="Operand steps to simulate.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of the random operands.")] = 0,
    simulator: Annotated[
        Literal["amaranth", "icarus", "verilator"] | None,
        typer.Option(help="Default: Icarus when installed, else Amaranth's."),
    ] = None,
    formal: Annotated[bool, typer.Option("--formal", help="Also prove the element's arithmetic (SAT).")] = False,
    whole: Annotated[
        bool, typer.Option("--whole", help="With --formal: prove it undivided too, some minutes.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Simulate the RTL against the exact evaluation, cycle by cycle; optionally prove the element's arithmetic.

    Example: `bitwright engine verify --rows 4 --columns 4 --formal`
    """
    from bitwright.core.progress import progress
    from bitwright.engine import formal as proofs
    from bitwright.engine import verify as simulation

    array = _array(rows, columns, processing_element, multiplier, operand_bits, accumulator_bits)
    with progress("Verifying", 1 + formal) as advance:
        report = simulation.verify(array, seed, vectors, simulator)
        advance(1)
        proof = proofs.formal_equivalence(array, whole) if formal or whole else None
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
    rows: Rows = 16, columns: Columns = 16, processing_element: Element = "multiply-accumulate",
    multiplier: Multiplier = "booth", operand_bits: OperandBits = 8, accumulator_bits: AccumulatorBits = 32,
    library: Annotated[
        str, typer.Option("--library", "-l", help="predictive-28nm, -45nm, -180nm, osu018, or a Liberty file.")
    ] = "predictive-28nm",
    objective: Annotated[
        Literal["area_delay", "area", "delay"], typer.Option(help="What to keep the best of.")
    ] = "area_delay",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Map an array to the gates of a cell library: area, maximum frequency, leakage.

    Example: `bitwright engine synthesise -p compressed-accumulation --library predictive-45nm`
    """
    from bitwright.core.quantity import format_value
    from bitwright.engine.libraries import find_library
    from bitwright.engine.rtl import TOP, generate
    from bitwright.engine.synthesis import synthesise_array

    array = _array(rows, columns, processing_element, multiplier, operand_bits, accumulator_bits)
    report = synthesise_array(generate(array), TOP, find_library(library), objective=objective)
    parts = {**report.parts, TOP: report.glue}
    instances = {**report.instances, TOP: 1}
    data = {
        "library": report.glue.library,
        "tool": report.glue.tool,
        "evidence": "synthesised",
        "area_um2": report.area_um2,
        "frequency_hz": 1 / report.period_s,
        "leakage_w": report.leakage_w,
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
            f"Array: {report.area_um2:,.0f} um2, {format_value(1 / report.period_s, 'Hz')}, leakage "
            f"{format_value(report.leakage_w, 'W')} [synthesised, before placement]",
            highlight=False,
            markup=False,
        )

    show(data, as_json, render)
