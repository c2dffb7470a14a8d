"""`bitwright engine explore`: many engines at once, and the Pareto front of area, energy and throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bitwright.cli.engine import commands
from bitwright.cli.main import show, table


@commands.command()
def explore(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="An exploration file: axes and matrix products.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report [default: bitwright-out/NAME].")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Local processes [default: one per core].")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a running Ray cluster ('auto': the local one) instead of processes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
    """Evaluate every combination of dataflow, shape, transformations, encoding, widths and library.

    Engines that differ only in rows and columns share their gates. Results are cached as they finish, so an interrupted
    exploration goes on where it stopped.

    Example: `bitwright engine explore studies/explore-engines.yaml -o out`
    """
    from bitwright.core.quantity import format_value
    from bitwright.study.exploration import explore as run
    from bitwright.study.exploration import load_exploration
    from bitwright.study.exploration_page import figures, to_json, write_exploration
    from bitwright.study.output import check_folder

    exploration = load_exploration(study)
    folder = output or Path("bitwright-out") / exploration.name
    check_folder(folder)
    result = run(exploration, study.parent, ray, processes)
    written = write_exploration(result, folder)

    def render(console: Console) -> None:
        rows = [
            [point.name, point.library, *(format_value(value.value, value.unit) for value in figures(point).values())]
            for point in result.front
        ]
        heads = ["engine", "library", "area", "clock", "throughput", "energy/MAC"]
        title = f"{result.name}: {len(result.front)} of {len(result.points)} engines are on the front"
        console.print(table(title, heads, rows, (2, 3, 4, 5)))
        for name, reason in result.refused.items():
            console.print(f"not built: {escape(name)}: {escape(reason.splitlines()[0])}", highlight=False)
        console.print("Written: " + escape(", ".join(str(path) for path in written[:2])), highlight=False)

    show(to_json(result), as_json, render)
