"""`bitwright systems` and `bitwright reproduce`: the catalogue of published systems and their claims."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from bitwright.cli.main import app, show, table


@app.command()
def systems(
    slug: str = typer.Argument(None, metavar="[SLUG]", help="One system; without it, all 76."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the published systems that Bitwright holds or plans.

    Example: `bitwright systems bitweight-tpe`
    """
    from bitwright.reproduce import catalogue

    chosen = [catalogue.system(slug)] if slug else catalogue.systems()
    columns = ["number", "slug", "status", "claims", "title"]
    rows = [
        [
            entry.number,
            entry.slug,
            entry.status,
            catalogue.verdict_counts(catalogue.stored_results(entry.slug)),
            entry.title,
        ]
        for entry in chosen
    ]
    data = [dict(zip(columns, row, strict=True)) for row in rows]
    show(data, as_json, lambda out: out.print(table("Systems", columns, rows)))


@app.command()
def reproduce(
    slug: str = typer.Argument(..., metavar="SLUG", help="A system of the catalogue, for example bitweight-tpe."),
    stored: bool = typer.Option(False, "--stored", help="Print the results kept with Bitwright; measure nothing."),
    output: Path = typer.Option(None, "--output", "-o", metavar="FILE", help="Write the results as JSON as well."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure the claims of a published system and print them beside the published figures.

    Example: `bitwright reproduce bitweight-tpe`, or without measuring `bitwright reproduce mixpe --stored`
    """
    from bitwright.core.errors import BitwrightError
    from bitwright.core.files import write_json
    from bitwright.core.quantity import format_value
    from bitwright.reproduce import catalogue

    results = catalogue.stored_results(slug) if stored else catalogue.reproduce(slug)
    if not results:
        raise BitwrightError(f"No results of {slug} are kept; run `bitwright reproduce {slug}` without --stored.")
    data = [result.to_json() for result in results]
    if output is not None:
        write_json(output, data)
    notes = list(dict.fromkeys(result.explanation for result in results if result.explanation))
    rows = [
        [
            result.name,
            result.conditions,
            format_value(result.published.value, result.published.unit),
            f"{format_value(result.ours.value, result.ours.unit)} {result.ours.evidence}" if result.ours else "-",
            result.verdict + (f" ({notes.index(result.explanation) + 1})" if result.explanation else ""),
        ]
        for result in results
    ]

    def render(out: Console) -> None:
        out.print(table(catalogue.system(slug).title, ["claim", "conditions", "published", "ours", "verdict"], rows))
        for number, note in enumerate(notes, 1):
            out.print(f"({number}) {note}", highlight=False, markup=False)

    show(data, as_json, render)
