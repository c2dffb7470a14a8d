"""The terminal report of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
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


def _value(figure: Quantity) -> str:
    return format_value(figure.value, figure.unit)


def _evidence(figure: Quantity) -> str:
    return f"[{_STYLE[figure.evidence]}]{figure.evidence}[/]"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def _side_by_side(title: str, columns: Mapping[str, Mapping[str, Quantity]]) -> Table:
    """Figures down, what they belong to across, the evidence last: of each column in turn where it differs."""
    rows = []
    for name in next(iter(columns.values())):
        row = [figures[name] for figures in columns.values()]
        kinds = [_evidence(figure) for figure in row]
        rows.append([name, *map(_value, row), ", ".join(kinds if len(set(kinds)) > 1 else kinds[:1])])
    return _table(title, ["", *map(escape, columns), "evidence"], rows)


def print_result(result: StudyResult, console: Console) -> None:
    """Print the figures of a study as tables, each figure with its evidence."""
    console.rule(f"[bold]{escape(result.title)}")
    if result.quality:
        rows = [
            [entry.format, _value(entry.perplexity), f"{entry.tokens:,}", _evidence(entry.perplexity)]
            for entry in result.quality
        ]
        console.print(_table("Is it still right?", ["format", "perplexity", "tokens", "evidence"], rows))
    console.print(_side_by_side("What has to be computed", result.workloads))
    gates = {
        f"{entry.engine}, {entry.formats}\n{entry.library}": {
            "element": entry.element_area,
            "fastest element": entry.element_max_frequency,
            "array": entry.array_area,
            "array frequency": entry.max_frequency,
            "peak": entry.peak,
            "density": entry.density,
            "leakage": entry.leakage,
        }
        for entry in result.gates
    }
    console.print(_side_by_side("What the engine is", gates))
    for phase in dict.fromkeys(entry.phase for entry in result.phases):
        costs = {
            f"{entry.engine}\n{entry.library}": {
                "array cycles": entry.cycles,
                "array utilisation": entry.utilisation,
                "time": entry.time,
                "speed": entry.tokens_per_second,
                "array energy": entry.array_energy_per_mac,
                "energy per token": entry.energy_per_token,
                **{f"  {name}": figure for name, figure in entry.energies.items()},
                "external traffic": entry.memory_traffic,
                "buffer traffic": entry.buffer_traffic,
            }
            for entry in result.phases
            if entry.phase == phase
        }
        console.print(_side_by_side(f"What it costs: {phase}", costs))
    for note in result.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    for entry in result.gates:
        for check in entry.checks:
            console.print(f"- {entry.engine}: {check}", highlight=False, markup=False)
