"""The `bitwright` command: every command is one call of a public function."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from bitwright import __version__
from bitwright.core.errors import BitwrightError
from bitwright.core.progress import set_quiet

_ORDER = ("evaluate", "trace", "formats", "engine", "kernels", "generate", "machine", "systems", "reproduce", "cache")
_INTERRUPTED = "Interrupted. Finished results are kept in the cache; nothing was left half-written."


class _Commands(TyperGroup):
    """The commands in the order of a study; an interrupt reaches `main`, where Typer would end without a word."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise BitwrightError(_INTERRUPTED) from error


app = typer.Typer(
    name="bitwright",
    cls=_Commands,
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
        sys.stdout.flush()  # here, so that a closed pipe or a full disk is met where it is handled
    else:
        render(Console())


def table(title: str, columns: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> Table:
    """A rich table of plain text; the columns in `right` are right-aligned."""
    drawn = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
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
    from bitwright.cli import (  # noqa: F401  (each adds its commands)
        cache,
        engine,
        evaluate,
        explore,
        formats,
        generate,
        kernels,
        machine,
        systems,
        trace,
    )

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
    debug = "--debug" in sys.argv[1:]
    try:
        app()
    except BitwrightError as error:
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 1, debug)
    except OSError as error:  # a closed pipe is not among them: Typer ends silently then
        where = f": {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = where or f" (the output, or temporary files in {tempfile.gettempdir()})"
            _fail(f"The disk is full{where}. Free some space and try again.", 1, debug)
        _fail(f"{error.strerror or error}{where}", 1, debug)
    except MemoryError:
        _fail("Not enough memory for this. Try a smaller window, batch or array.", 1, debug)
    except Exception as error:
        kind = type(error).__name__
        _fail(f"{kind}: {error}. This is a fault of Bitwright; please report it with the output of --debug.", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        raise  # noqa: PLE0704  (called from an except block)
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:  # what could not be written would fail again, noisily, when Python ends
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(code)
