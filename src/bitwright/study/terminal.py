"""The terminal report of a study."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bitwright.core.quantity import Evidence, Quantity, format_value
from bitwright.study.result import StudyResult

_STYLE = {
    Evidence.EXECUTED: "green",
    Evidence.SYNTHESISED: "cyan",
    Evidence.SIMULATED: "blue",
    Evidence.PREDICTED: "yellow",
    Evidence.PUBLISHED: "magenta",
}


def _cell(figure: Quantity) -> str:
    return f"{format_value(figure.value, figure.unit)} [{_STYLE[figure.evidence]}]{figure.evidence[:3]}[/]"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def print_result(result: StudyResult, console: Console) -> None:
    """Print the figures of a study as tables, each figure with a colour for its evidence."""
    console.rule(f"[bold]{result.title}")
    console.print("Evidence: " + "  ".join(f"[{style}]{kind[:3]}[/] {kind}" for kind, style in _STYLE.items()))
    if result.quality:
        rows = [
            [entry.format, _cell(entry.perplexity), f"{entry.tokens:,}", entry.execution] for entry in result.quality
        ]
        console.print(_table("Is it still right?", ["format", "perplexity", "tokens", "execution"], rows))
    names = list(next(iter(result.workloads.values()), {}))
    rows = [[phase, *(_cell(figures[name]) for name in names)] for phase, figures in result.workloads.items()]
    console.print(_table("What has to be computed", ["phase", *names], rows))
    if result.gates:
        rows = [
            [
                f"{entry.engine} / {entry.library}",
                _cell(entry.element_area),
                _cell(entry.element_max_frequency),
                _cell(entry.array_area),
                _cell(entry.max_frequency),
                _cell(entry.peak),
                _cell(entry.density),
            ]
            for entry in result.gates
        ]
        columns = ["engine / cells", "element", "element, fastest", "array", "array frequency", "peak", "density"]
        console.print(_table("What the engine is", columns, rows))
    for phase in dict.fromkeys(entry.phase for entry in result.phases):
        rows = [
            [
                f"{entry.engine} / {entry.library}",
                _cell(entry.cycles),
                _cell(entry.utilisation),
                _cell(entry.tokens_per_second),
                _cell(entry.array_energy_per_mac),
                _cell(entry.energy_per_token),
                _cell(entry.memory_traffic),
            ]
            for entry in result.phases
            if entry.phase == phase
        ]
        columns = ["engine / cells", "cycles", "utilisation", "speed", "array energy", "energy/token", "traffic"]
        console.print(_table(f"What it costs: {phase}", columns, rows))
    for note in result.notes:
        console.print(f"  - {note}", highlight=False)
