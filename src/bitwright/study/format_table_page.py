"""The outputs of a format table: one HTML page with Pareto plots, and the figures as JSON."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from bitwright.core.files import write_json, write_whole
from bitwright.core.quantity import format_value
from bitwright.study.exploration import pareto
from bitwright.study.format_table import RowResult, TableSetup
from bitwright.study.output import check_folder
from bitwright.study.page import document, figure_cell, plot_block, table_block

_SCHEMA = 1
COLUMNS = (
    "perplexity", "embedding cosine", "recall@1", "same first passage", "weight bits", "activation bits", "KV bits",
    "traffic", "PE area", "energy per MAC",
)  # fmt: skip
HEADS = ("ppl", "cosine", "recall", "same", "W bits", "A bits", "KV bits", "MB/token", "PE um2", "pJ/MAC")
_SCALES = {"traffic": 1e-6, "energy per MAC": 1e12}
AXES = {
    "traffic": ("bytes moved per decoded token (MB)", 1e-6),
    "weight bits": ("stored bits per weight", 1.0),
    "energy per MAC": ("energy per multiply-accumulate (pJ)", 1e12),
}

_HIGHEST = 2.5  # perplexities above so many times the least are of no use; they would hide the others


def to_json(results: Sequence[RowResult], setup: TableSetup) -> dict[str, Any]:
    """The whole table as JSON values."""
    return {
        "schema": _SCHEMA,
        "setup": asdict(setup),
        "rows": [
            {
                "name": result.row.name,
                "assignment": asdict(result.row.assignment),
                "figures": {name: figure.to_json() for name, figure in result.figures.items()},
                "notes": dict(result.notes),
            }
            for result in results
        ],
    }


def write_table(results: Sequence[RowResult], setup: TableSetup, folder: Path) -> list[Path]:
    """Write formats.html and results.json; returns their paths. Raises InputError for the folder."""
    check_folder(folder)
    page, data = folder / "formats.html", folder / "results.json"
    write_whole(page, page_text(results, setup))
    write_json(data, to_json(results, setup))
    return [page, data]


def cell(result: RowResult, column: str) -> str:
    """A figure as plain text in the units of `HEADS`, or a dash."""
    figure = result.figures.get(column)
    return "-" if figure is None else format_value(figure.value * _SCALES.get(column, 1.0), "")


def on_front(results: Sequence[RowResult], axis: str) -> tuple[RowResult, ...]:
    """Rows that no other row beats in perplexity and `axis` together, by the axis. Rows without the figure are left
    out."""
    with_figure = [result for result in results if axis in result.figures]
    if not with_figure:
        return ()
    both = np.array([[each.figures["perplexity"].value, each.figures[axis].value] for each in with_figure])
    kept = [each for each, flag in zip(with_figure, pareto(both), strict=True) if flag]
    return tuple(sorted(kept, key=lambda each: each.figures[axis].value))


def scatter(results: Sequence[RowResult], axis: str) -> go.Figure:
    """Perplexity against `axis`, the front joined and labelled; rows above `_HIGHEST` times the least are triangles on
    the upper edge."""
    title, scale = AXES[axis]
    shown = [each for each in results if axis in each.figures]
    least = min((each.figures["perplexity"].value for each in shown), default=1.0)
    edge = _HIGHEST * least
    front = [each for each in on_front(shown, axis) if each.figures["perplexity"].value <= edge]
    above = [each for each in shown if each.figures["perplexity"].value > edge]
    others = [each for each in shown if each not in front and each not in above]
    groups = (
        ("others", others, "markers", "circle"),
        (f"perplexity above {edge:.0f}", above, "markers", "triangle-up"),
        ("front", front, "lines+markers+text", "circle"),
    )
    figure = go.Figure()
    for label, chosen, mode, symbol in groups:
        figure.add_scatter(
            name=label, mode=mode, text=[each.row.name for each in chosen], marker={"size": 9, "symbol": symbol},
            textposition=["bottom center" if index % 2 else "top center" for index in range(len(chosen))],
            x=[each.figures[axis].value * scale for each in chosen],
            y=[min(edge, each.figures["perplexity"].value) for each in chosen],
            customdata=[each.figures["perplexity"].value for each in chosen],
            hovertemplate="%{text}<br>%{x:.4g}<br>perplexity %{customdata:.4g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=title, type="log")
    figure.update_yaxes(title="perplexity", range=[0.9 * least, 1.03 * edge])
    return figure


def page_text(results: Sequence[RowResult], setup: TableSetup) -> str:
    """The whole page."""
    blocks = [
        "<h1>Which number system for this network?</h1>"
        f"<p>{len(results)} rows; perplexity over {setup.windows} windows of {setup.window} tokens.</p>"
    ]
    for axis in AXES:
        if any(axis in result.figures for result in results):
            blocks.append(
                plot_block(
                    scatter(results, axis), f"Perplexity against {axis}; to the lower left is better", height=480
                )
            )
    rows = [
        [
            html.escape(result.row.name),
            *(
                figure_cell(result.figures[name]) if name in result.figures else html.escape(result.notes.get(name, ""))
                for name in COLUMNS
            ),
        ]
        for result in results
    ]
    blocks.append("<h2>All rows</h2>" + table_block(["row", *COLUMNS], rows))
    return document("Number formats", "".join(blocks))
