"""`bitwright systems` and `bitwright reproduce`: the catalogue of published systems and their claims."""

from __future__ import annotations

import typer

from bitwright.cli.main import app, show, table


@app.command()
def systems(
    slug: str = typer.Argument(None, help="One system; without it, all 76."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the published systems that Bitwright holds or plans."""
    from bitwright.reproduce import catalogue

    chosen = [catalogue.system(slug)] if slug else catalogue.systems()
    rows = [[entry.number, entry.slug, entry.status, entry.title] for entry in chosen]
    data = [{"number": a, "slug": b, "status": c, "title": d} for a, b, c, d in rows]
    show(data, as_json, lambda out: out.print(table("Systems", ["no.", "slug", "status", "title"], rows)))


@app.command()
def reproduce(
    slug: str = typer.Argument(..., help="A system of the catalogue, for example bitweight-tpe."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Measure the claims of a published system and print them beside the published figures."""
    from bitwright.reproduce import catalogue

    results = catalogue.reproduce(slug)
    rows = [
        [
            result.name,
            result.conditions,
            str(result.published),
            str(result.ours) if result.ours else "-",
            result.verdict,
            result.explanation,
        ]
        for result in results
    ]
    columns = ["claim", "conditions", "published", "ours", "verdict", "explanation"]
    show([result.to_json() for result in results], as_json, lambda out: out.print(table(slug, columns, rows)))
