"""`bitwright trace`: a network as a workload, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from bitwright.cli.main import app, show, table
from bitwright.core.errors import InputError


@app.command()
def trace(
    model: str = typer.Argument(
        ...,
        metavar="MODEL",
        help="An ONNX file, a Hugging Face config.json or folder, or a configuration such as llama-3-70b.",
    ),
    phase: Literal["prefill", "decode", "training"] = typer.Option("prefill", help="Phase of a configuration."),
    batch: int = typer.Option(1, help="Sequences or images (configurations)."),
    tokens: int = typer.Option(512, help="Prompt tokens (prefill, training)."),
    context: int = typer.Option(
        None, help="Tokens in the KV cache: needed for decode [default: 512 for decode, else 0]."
    ),
    dimension: Annotated[
        list[str] | None, typer.Option("--dimension", "-d", help="A symbolic ONNX dimension: batch=4. Repeatable.")
    ] = None,
    machine: str = typer.Option(None, help="Also predict the time on a machine (see `bitwright machine list`)."),
    output: Path = typer.Option(None, "--output", "-o", help="Write the whole workload as JSON."),
    as_json: bool = typer.Option(False, "--json", help="Print the whole workload as JSON."),
) -> None:
    """Trace a network into a workload: operators, multiply-accumulates, bytes; unknown operators are named.

    Example: `bitwright trace llama-3-8b --phase decode --context 4096 --machine h100-sxm`
    """
    from bitwright.core.files import write_json
    from bitwright.core.quantity import format_value
    from bitwright.core.workload_summary import summarise, to_json
    from bitwright.models.trace import trace as trace_model

    cached = context if context is not None else (512 if phase == "decode" else 0)
    workload = trace_model(model, phase, batch, tokens, cached, _dimensions(dimension or []))
    data = to_json(workload)
    if machine is not None:
        from bitwright.core.cost import evaluate
        from bitwright.core.machine import load_machine

        cost = evaluate(workload, load_machine(machine).device())
        data["predicted"] = {"machine": machine, "time_s": cost.time_s, "time_by_bound_s": dict(cost.time_by_bound())}
    if output:
        write_json(output, data)

    def render(out: Console) -> None:
        rows = [
            [
                str(row.kind),
                f"{row.count:,}",
                format_value(row.macs, "MAC"),
                f"{row.macs_share:.1%}",
                format_value(row.bytes, "B"),
                f"{row.bytes_share:.1%}",
            ]
            for row in summarise(workload)
        ]
        total = [f"{len(workload):,}", format_value(workload.macs, "MAC"), "", format_value(workload.bytes, "B"), ""]
        rows.append(["all", *total])
        columns = ["operators", "count", "multiply-accumulates", "share", "bytes", "share"]
        out.print(table(workload.name, columns, rows, (1, 2, 3, 4, 5)))
        out.print(f"Parameters: {workload.parameters:,}", highlight=False, markup=False)
        for operator in workload.unknown:
            out.print(
                f"Not understood, counted by bytes: {operator.name} ({operator.target})", highlight=False, markup=False
            )
        for note in workload.notes:
            out.print(f"- {note}", highlight=False, markup=False)
        if machine is not None:
            out.print(
                f"{machine}: {format_value(data['predicted']['time_s'], 's')} [predicted]",
                highlight=False,
                markup=False,
            )

    show(data, as_json, render)


def _dimensions(given: list[str]) -> dict[str, int]:
    found = {}
    for entry in given:
        name, _, value = entry.partition("=")
        if not name or not value.isdigit():
            raise InputError(f"--dimension {entry!r} is not of the form name=number, for example batch=4.")
        found[name] = int(value)
    return found
