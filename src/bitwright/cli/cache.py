"""`bitwright cache`: what the cache of expensive results holds."""

from __future__ import annotations

import typer

from bitwright.cli.main import app, show, table
from bitwright.core import cache

commands = typer.Typer(
    help="Expensive results (synthesis, executed models), kept by content hash.", no_args_is_help=True
)
app.add_typer(commands, name="cache")


@commands.command("show")
def show_cache(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show the cache folder and what it holds.

    Example: `bitwright cache show`
    """
    uses = cache.usage()
    data = {"folder": str(cache.folder()), "kinds": [vars(use) for use in uses]}
    rows = [[use.kind, str(use.entries), f"{use.bytes / 1e6:.2f}"] for use in uses]
    show(
        data,
        as_json,
        lambda out: out.print(table(f"Cache in {cache.folder()}", ["result", "entries", "MB"], rows, (1, 2))),
    )


@commands.command("clear")
def clear_cache(
    kind: str = typer.Argument(None, metavar="[KIND]", help="Only results of this kind (see `bitwright cache show`)."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Remove cached results; they are computed again when needed.

    Example: `bitwright cache clear synthesis`
    """
    removed = cache.clear(kind)
    show({"removed": removed}, as_json, lambda out: out.print(f"Removed {removed} entries."))
