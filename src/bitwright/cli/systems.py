"""`bitwright systems` and `bitwright reproduce`: the catalogue of published systems and their claims."""

from __future__ import annotations

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
    rows = [[entry.number, entry.slug, entry.status, entry.title] for entry in chosen]
    data = [{"number": a, "slug": b, "status": c, "title": d} for a, b, c, d in rows]
    show(data, as_json, lambda out: out.print(table("Systems", ["no.", "slug", "status", "title"], rows)))


@app.command()
def reproduce(
    slug: str = typer.Argument(..., metavar="SLUG", help="A system of the catalogue, for example bitweight-tpe."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure the claims of a published system and print them beside the published figures.

    Example: `bitwright reproduce bitweight-tpe`
    """
    from bitwright.core.quantity import format_value
    from bitwright.reproduce import catalogue

    results = catalogue.reproduce(slug)
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

    show([result.to_json() for result in results], as_json, render)
