"""Draw the picture and write the table of the page "Which number system for this network?" from a computed table.

    bitwright formats table -o bitwright-out/formats
    python benchmarks/format_figures.py bitwright-out/formats/results.json

Writes docs/images/formats-pareto.png (HTML when no headless Chromium is installed) and the table between the markers of
docs/number-formats.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import plotly.graph_objects as go
from engine_figures import save

from bitwright.core.quantity import Quantity, format_value
from bitwright.models.format_execution import FormatAssignment
from bitwright.study.format_table import FormatRow, RowResult
from bitwright.study.format_table_page import on_front, scatter

PAGE = Path(__file__).parent.parent / "docs" / "number-formats.md"
START, END = "<!-- table -->", "<!-- end of table -->"
COLUMNS = {
    "perplexity": "perplexity", "embedding cosine": "cosine", "recall@1": "recall@1",
    "same first passage": "same first", "weight bits": "W bits", "activation bits": "A bits", "KV bits": "KV bits",
    "traffic": "traffic per token", "PE area": "PE area", "energy per MAC": "energy per MAC",
}  # fmt: skip


def read(path: Path) -> tuple[RowResult, ...]:
    """The rows of a results.json."""
    return tuple(
        RowResult(
            FormatRow(row["name"], FormatAssignment(**row["assignment"])),
            {name: Quantity.from_json(figure) for name, figure in row["figures"].items()},
            row["notes"],
        )
        for row in json.loads(path.read_text())["rows"]
    )


def markdown(results: tuple[RowResult, ...]) -> str:
    """The table of the manual; rows on the front of perplexity and traffic are bold."""
    front = {result.row.name for result in on_front(results, "traffic")}
    lines = ["| row | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for result in results:
        name = f"**{result.row.name}**" if result.row.name in front else result.row.name
        cells = [
            format_value(result.figures[column].value, result.figures[column].unit) if column in result.figures else "-"
            for column in COLUMNS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: tuple[RowResult, ...], axis: str) -> go.Figure:
    """The plot of the table's page, as a picture of its own."""
    figure = scatter(results, axis)
    figure.update_layout(template="plotly_white", height=640, margin_t=70,
                         title=f"SmolLM2-135M: perplexity [executed] against {axis}")  # fmt: skip
    return figure


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    for name, axis in (("formats-pareto", "traffic"), ("formats-energy", "energy per MAC")):
        if any(axis in result.figures for result in found):
            print(save(picture(found, axis), name))
    text = PAGE.read_text()
    before, rest = text.split(START)
    PAGE.write_text(f"{before}{START}\n\n{markdown(found)}\n\n{END}{rest.split(END)[1]}")
    print(PAGE)
