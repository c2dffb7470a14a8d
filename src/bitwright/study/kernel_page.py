"""The outputs of a benchmark of kernels: one HTML page with a roofline plot, and the figures as JSON."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from bitwright.core.files import write_json, write_whole
from bitwright.core.quantity import Evidence, Quantity
from bitwright.kernels.benchmark import Timing, peak_rates, this_machine
from bitwright.kernels.work import Rates, rates_of
from bitwright.study.page import document, figure_cell, plot_block, table_block


def roofline_plot(timings: Sequence[Timing], rates: Rates, threads: int) -> go.Figure:
    """Operations per second against operations per byte of main memory, for the timings with so many threads, under
    the roofs of this machine; peers stand at the kernel's bytes."""
    shown = [timing for timing in timings if timing.threads == threads]
    intensities = [timing.case.intensity for timing in shown]
    x = np.geomspace(min(0.1, *intensities), 2 * max(100.0, *intensities), 200)
    figure = go.Figure()
    for kind, rate in rates.operations_per_s.items():
        roof = np.minimum(rate * min(threads, rates.cores), x * rates.bytes_per_s["memory"])
        figure.add_scatter(x=x, y=roof, mode="lines", name=f"roof of {kind}", line={"width": 1})
    peers = [timing.peers_s.get(timing.fastest_peer, np.nan) for timing in shown]
    sides = (("kernel", [timing.time_s for timing in shown], "circle"), ("fastest peer", peers, "circle-open"))
    for name, times, symbol in sides:
        figure.add_scatter(
            x=intensities, y=[timing.case.operations / each for timing, each in zip(shown, times, strict=True)],
            mode="markers", name=name, marker={"size": 10, "symbol": symbol},
            text=[f"{timing.case.kernel}: {timing.case.title}" for timing in shown],
            hovertemplate="%{text}<br>%{x:.3g} operations/B<br>%{y:.3g} operations/s<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(type="log", title="operations asked for per byte of main memory")
    figure.update_yaxes(type="log", title="operations asked for per second")
    return figure


def page_text(timings: Sequence[Timing], rates: Rates) -> str:
    """The whole page."""
    blocks = ["<h1>Kernels on this machine</h1><p>Medians, all sides of a case interleaved in one process.</p>"]
    for threads in sorted({timing.threads for timing in timings}):
        title = f"Roofline, {threads} thread{'s' if threads > 1 else ''}"
        blocks.append(plot_block(roofline_plot(timings, rates, threads), title, height=520))
    rows = []
    for timing in timings:
        peers = "<br>".join(html.escape(f"{name}: {t / timing.time_s:.2f}x") for name, t in timing.peers_s.items())
        rows.append([
            html.escape(f"{timing.case.kernel}: {timing.case.title}"), str(timing.threads),
            figure_cell(Quantity(timing.time_s, "s", Evidence.EXECUTED)),
            figure_cell(Quantity(timing.limit.time_s, "s", Evidence.PREDICTED)), html.escape(timing.limit.bound), peers,
        ])  # fmt: skip
    columns = ["case", "threads", "time", "limit", "bound by", "times as fast as"]
    return document("Kernels", "".join(blocks) + table_block(columns, rows))


def write_kernel_page(timings: Sequence[Timing], folder: Path) -> list[Path]:
    """Write kernels.html and results.json; returns their paths."""
    page, data = folder / "kernels.html", folder / "results.json"
    write_whole(page, page_text(timings, rates_of(this_machine().device(), peak_rates())))
    write_json(data, [timing.to_json() for timing in timings])
    return [page, data]
