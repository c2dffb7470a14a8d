"""The `bitwright` command: every command is one call of a public function."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from bitwright import __version__
from bitwright.core.errors import BitwrightError
from bitwright.core.progress import set_quiet

app = typer.Typer(
    name="bitwright",
    help="Co-design workbench for tensor computing: networks, tensor engines down to gates, machines, in one study.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode="markdown",
)


def show(data: Any, as_json: bool, render: Callable[[Console], None]) -> None:
    """Print `data` as JSON, or let `render` draw it for a terminal."""
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        render(Console())


def table(title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> Table:
    """A rich table; the columns in `right` are right-aligned."""
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bitwright {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the whole traceback of an error."),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="No progress bars."),
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Options that come before the command."""
    set_quiet(quiet)


def main() -> None:
    """Run the command line; every expected failure is one sentence on standard error and exit code 1 or 2."""
    from bitwright.cli import cache, engine, evaluate, machine, systems, trace  # noqa: F401  (each adds its commands)

    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except BitwrightError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail("Interrupted. Finished results are kept in the cache; nothing was left half-written.", 1, debug)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                f"The disk is full ({error.filename or 'temporary folder'}). Free some space and try again.", 1, debug
            )
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1, debug)
    except MemoryError:
        _fail("Not enough memory for this. Try a smaller window, batch or array.", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        raise  # noqa: PLE0704  (called from an except block)
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    sys.exit(code)
