"""Progress of long work, on standard error so that standard output stays machine-readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

_console = Console(stderr=True)
_active: list[Progress] = []


def set_quiet(quiet: bool) -> None:
    """Turn progress display off or on for this process."""
    _console.quiet = quiet


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar while the block runs; the value yielded is called with the number of steps done.

    Blocks may nest: an inner block adds a line to the display of the outer one.
    """
    if _active:
        bar = _active[0]
        task = bar.add_task(description, total=total)
        try:
            yield lambda steps: bar.advance(task, steps)
        finally:
            bar.remove_task(task)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Without a terminal a transient display would leave nothing but an empty line.
    with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as bar:
        _active.append(bar)
        task = bar.add_task(description, total=total)
        try:
            yield lambda steps: bar.advance(task, steps)
        finally:
            _active.clear()
