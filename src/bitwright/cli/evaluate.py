"""`bitwright evaluate`: a study file in, tables, a page, figures and traces out."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from bitwright.cli.main import app, show


@app.command()
def evaluate(
    study: Path = typer.Argument(..., metavar="STUDY", help="A study file, for example studies/smollm2-int8.yaml."),
    output: Path = typer.Option(
        None,
        "--output",
        "-o",
        help="Folder for report.html, results.json, traces and Verilog [default: bitwright-out/NAME].",
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON instead of tables."),
) -> None:
    """Evaluate a study: run the model, synthesise the engines, map the workload, write the reports.

    Expensive steps are cached: a second run with the same inputs takes seconds.

    Example: `bitwright evaluate studies/smollm2-int8.yaml -o out`
    """
    from bitwright.study.evaluate import evaluate_study
    from bitwright.study.file import load_study
    from bitwright.study.output import check_folder, write_outputs
    from bitwright.study.result import to_json
    from bitwright.study.terminal import print_result

    folder = output or Path("bitwright-out") / study.stem
    description = load_study(study)
    check_folder(folder)
    result = evaluate_study(description, study.parent)
    written = write_outputs(result, folder)

    def render(console: Console) -> None:
        print_result(result, console)
        console.print("Written: " + escape(", ".join(str(path) for path in written)), highlight=False)

    show(to_json(result), as_json, render)
