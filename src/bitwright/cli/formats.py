"""`bitwright formats`: number formats by name, their errors, and which one suits a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bitwright.cli.main import app, show, table

commands = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Number formats: what they are, what they lose and cost."
)
app.add_typer(commands, name="formats")


@commands.command("list")
def list_formats(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """How formats are written, with the bits and rounding error of an example of each.

    Example: `bitwright formats list`
    """
    from bitwright.arithmetic import formats
    from bitwright.study.format_errors import EXAMPLES, normal_error

    found = [normal_error(name) for name in EXAMPLES]

    def render(console: Console) -> None:
        rows = [[each.name, f"{each.bits:.4g}", f"{each.statistics.sqnr_db:.1f} dB", each.operand] for each in found]
        heads = ["format", "bits per element", "signal to noise", "hardware operand"]
        console.print(table("Examples, on normal data of 64 x 4096 [executed]", heads, rows, (1, 2)))
        console.print("Formats are written: " + escape(formats.GRAMMAR) + ".", highlight=False)

    show({"grammar": formats.GRAMMAR, "examples": [each.to_json() for each in found]}, as_json, render)


@commands.command()
def error(
    name: Annotated[str, typer.Argument(metavar="FORMAT", help="A format, for example int4/32 or mxfp8_e4m3.")],
    data: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A .npy or .safetensors file [default: normally distributed data]."),
    ] = None,
    tensor: Annotated[
        str | None, typer.Option(help="Which tensor of the file [default: every one of two axes].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a tensor loses when it is rounded to a format along its last axis.

    Example: `bitwright formats error mxfp4`
    """
    from bitwright.study.format_errors import file_errors, normal_error

    found = [normal_error(name)] if data is None else file_errors(name, data, tensor)

    def render(console: Console) -> None:
        rows = [
            [each.tensor, f"{each.bits:.4g}", f"{each.statistics.sqnr_db:.2f} dB",
             f"{each.statistics.relative_mse:.4g}", f"{each.statistics.largest:.4g}"]
            for each in found
        ]  # fmt: skip
        heads = ["tensor", "bits per element", "signal to noise", "relative mean square error", "largest error"]
        console.print(table(f"Rounding to {name} [executed]", heads, rows, (1, 2, 3, 4)))

    show([each.to_json() for each in found], as_json, render)


@commands.command("table")
def format_table(
    rows: Annotated[
        Path | None, typer.Option(help="YAML list of rows: name, weights, activations, keys, values, ...")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text for perplexity.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Tokens per window.")] = 512,
    library: Annotated[
        str, typer.Option(help="Cell library of the hardware figures; 'none' leaves them out.")
    ] = "osu018",
    processes: Annotated[int | None, typer.Option(min=1, help="Local processes [default: one per core].")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path(
        "bitwright-out/formats"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which number system for this network: perplexity, retrieval, bits, traffic, area and energy of every row.

    Results are cached row by row, so an interrupted table goes on where it stopped.

    Example: `bitwright formats table --windows 8 -o out`
    """
    from bitwright.engine.libraries import find_library
    from bitwright.study.format_hardware import with_hardware
    from bitwright.study.format_table import TableSetup, default_rows, read_rows
    from bitwright.study.format_table import format_table as run
    from bitwright.study.format_table_page import COLUMNS, HEADS, cell, to_json, write_table
    from bitwright.study.output import check_folder

    setup = TableSetup(windows, window)
    chosen = default_rows() if rows is None else read_rows(rows)
    check_folder(output)
    if library != "none":
        find_library(library)  # before the long part
    results = run(chosen, setup, processes)
    if library != "none":
        results = with_hardware(results, library)
    written = write_table(results, setup, output)

    def render(console: Console) -> None:
        drawn = [[each.row.name, *(cell(each, name) for name in COLUMNS)] for each in results]
        right = tuple(range(1, len(COLUMNS) + 1))
        title = (
            f"Number formats: perplexity of {windows} windows of {window} tokens [executed], cosine, recall@1 and same "
        )
        title += "first passage of sentence embeddings [executed], bits and traffic [predicted], hardware [synthesised]"
        console.print(table(title, ["row", *HEADS], drawn, right))
        console.print("Written: " + escape(", ".join(map(str, written))), highlight=False)

    data: Any = to_json(results, setup)
    show(data, as_json, render)
