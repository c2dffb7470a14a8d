"""The HTML report of a study: one self-contained file with plots."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bitwright.core.quantity import Quantity, format_value
from bitwright.study.result import Gates, Phase, StudyResult

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:24px;color:#1c2430;background:#fff}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:20px;margin:40px 0 8px;border-bottom:1px solid #d8dee6;padding-bottom:4px}
table{border-collapse:collapse;width:100%;margin:8px 0 16px;font-size:14px}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid #e6eaef;white-space:nowrap}
th{font-weight:600;background:#f5f7fa}
th:first-child,td:first-child{text-align:left}
.e{font-size:10px;border-radius:8px;padding:1px 6px;margin-left:5px;color:#fff}
td .e{display:block;width:fit-content;margin:0 0 0 auto}
.executed{background:#2e7d32}.synthesised{background:#00788a}.simulated{background:#2c5cc5}
.predicted{background:#a86200}.published{background:#8e3a8e}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:16px}
.plots>div{min-width:0}.wide{grid-column:1/-1}
details{margin:8px 0}summary{cursor:pointer;font-weight:600}
pre{overflow:auto;max-height:480px;background:#f5f7fa;padding:12px;font-size:12px}
.scroll{overflow-x:auto}li{margin:4px 0}
@media(max-width:800px){.plots{grid-template-columns:1fr}}
"""


def figure_cell(quantity: Quantity) -> str:
    """A figure with its unit and its evidence, as the content of a table cell."""
    title = html.escape(quantity.source)
    value = html.escape(format_value(quantity.value, quantity.unit))
    return f'<span title="{title}">{value}</span><span class="e {quantity.evidence}">{quantity.evidence}</span>'


def table_block(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; a click on a heading sorts it."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plot_block(figure: go.Figure, title: str, wide: bool = False, height: int = 360) -> str:
    """A plotly figure as part of a page."""
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=height,
        margin={"l": 60, "r": 20, "t": 48, "b": 48},
        template="plotly_white",
        legend={"orientation": "h", "y": -0.2},
        legend_title_text="",
    )
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return f'<div class="{"wide" if wide else ""}">{drawn}</div>'


def _label(entry: Gates | Phase) -> str:
    return f"{entry.engine} / {entry.library}"


def _stacked(rows: Mapping[str, Mapping[str, float]], axis: str) -> go.Figure:
    """Horizontal stacked bars: rows of parts."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    figure = go.Figure()
    for part in parts:
        figure.add_bar(y=list(rows), x=[row.get(part, 0.0) for row in rows.values()], name=part, orientation="h")
    figure.update_layout(barmode="stack", xaxis_title=axis)
    return figure


def area_plot(gates: Sequence[Gates]) -> go.Figure:
    """Area of every engine by component, um^2."""
    rows = {_label(entry): {name: figure.value for name, figure in entry.areas.items()} for entry in gates}
    return _stacked(rows, "area (µm²)")


def energy_plot(phases: Sequence[Phase]) -> go.Figure:
    """Energy per token of every engine and phase by component, joules."""
    rows = {
        f"{_label(entry)}: {entry.phase}": {name: figure.value for name, figure in entry.energies.items()}
        for entry in phases
    }
    figure = _stacked(rows, "energy per token (J)")
    figure.update_xaxes(tickformat="~s")
    return figure


def roofline_plot(phases: Sequence[Phase], roofline: Mapping[str, float]) -> go.Figure:
    """Every product of every phase: operations per byte of external traffic against attained operations per second."""
    figure = go.Figure()
    bandwidth = roofline["memory_bandwidth"]
    for label, peak in roofline.items():
        if label != "memory_bandwidth":
            ridge = peak / bandwidth
            figure.add_scatter(
                x=[0.1, ridge, 1e5], y=[0.1 * bandwidth, peak, peak], mode="lines", name=f"{label} limit", opacity=0.6
            )
    for entry in phases:
        spans = entry.schedule.task_times()
        points = [operator for operator in entry.operators if operator.macs and operator.memory_bytes]
        times = [max(spans[operator.name], operator.memory_bytes / bandwidth) for operator in points]
        figure.add_scatter(
            x=[2 * operator.macs / operator.memory_bytes for operator in points],
            y=[2 * operator.macs / time for operator, time in zip(points, times, strict=True)],
            text=[operator.name for operator in points],
            mode="markers",
            name=f"{_label(entry)}: {entry.phase}",
            marker={"size": 6, "opacity": 0.7},
        )
    figure.update_xaxes(type="log", title="operations per byte of external traffic")
    figure.update_yaxes(type="log", title="operations per second")
    return figure


def layer_time_plot(phase: Phase) -> go.Figure:
    """Busy time of the array, or of the vector unit where there is no product, of every operator of one phase."""
    figure = go.Figure()
    spans = phase.schedule.task_times()
    timed = [(place, operator) for place, operator in enumerate(phase.operators) if operator.name in spans]
    for kind in dict.fromkeys(operator.kind for _, operator in timed):
        chosen = [(place, operator.name) for place, operator in timed if operator.kind is kind]
        figure.add_bar(
            x=[place for place, _ in chosen],
            y=[spans[name] for _, name in chosen],
            text=[name for _, name in chosen],
            textposition="none",
            width=1,
            marker={"line": {"width": 0}},
            hovertemplate="%{text}<br>%{y:.4s}s<extra></extra>",
            name=str(kind),
        )
    figure.update_layout(bargap=0, barmode="overlay")
    figure.update_xaxes(title="operators in order")
    figure.update_yaxes(title="time (s)", tickformat="~s")
    return figure


def digit_plot(histograms: Mapping[str, Mapping[str, tuple[float, ...]]]) -> go.Figure:
    """Share of values by number of non-zero digits, per encoding and operand."""
    figure = go.Figure()
    for operand, encodings in histograms.items():
        for encoding, shares in encodings.items():
            figure.add_bar(x=list(range(len(shares))), y=list(shares), name=f"{operand}, {encoding}")
    figure.update_layout(barmode="group", xaxis_title="non-zero digits of a value", yaxis_title="share of values")
    return figure


def accuracy_plot(result: StudyResult, phase: str) -> go.Figure | None:
    """Perplexity of an engine's formats against its energy per token in one phase, None unless formats differ."""
    perplexity = {entry.format: entry.perplexity.value for entry in result.quality}
    points = [entry for entry in result.phases if entry.phase == phase and entry.formats in perplexity]
    if len({entry.formats for entry in points}) < 2:
        return None
    figure = go.Figure()
    for name in dict.fromkeys(entry.formats for entry in points):
        chosen = [entry for entry in points if entry.formats == name]
        figure.add_scatter(
            x=[entry.energy_per_token.value for entry in chosen],
            y=[perplexity[name]] * len(chosen),
            text=[_label(entry) for entry in chosen],
            mode="markers+text",
            textposition="top center",
            name=name,
            marker={"size": 10},
        )
    figure.update_xaxes(title="energy per token (J)", tickformat="~s", rangemode="tozero")
    figure.update_yaxes(title="perplexity")
    return figure


def render(result: StudyResult) -> str:
    """The whole page as text."""
    parts: list[str] = [f"<h1>{html.escape(result.title)}</h1>"]
    parts.append(
        "<p>Every figure carries its evidence: "
        + " ".join(
            f'<span class="e {kind}">{kind}</span>'
            for kind in ("executed", "synthesised", "simulated", "predicted", "published")
        )
        + "</p>"
    )
    if result.quality:
        parts.append("<h2>Is it still right?</h2>")
        rows = [
            [entry.format, figure_cell(entry.perplexity), f"{entry.tokens:,}", html.escape(entry.execution)]
            for entry in result.quality
        ]
        parts.append(table_block(["format", "perplexity", "tokens", "execution"], rows))
    parts.append("<h2>What has to be computed</h2>")
    names = list(next(iter(result.workloads.values()), {}))
    rows = [[phase, *(figure_cell(figures[name]) for name in names)] for phase, figures in result.workloads.items()]
    parts.append(table_block(["phase", *names], rows))
    parts.append('<div class="plots">')
    if result.digit_histograms:
        parts.append(
            plot_block(digit_plot(result.digit_histograms), "Non-zero digits of the INT8 operands [executed]", True)
        )
    parts.append("</div>")
    parts.append("<h2>What the engine is</h2>")
    rows = [
        [
            html.escape(_label(entry)),
            html.escape(entry.formats),
            figure_cell(entry.element_area),
            figure_cell(entry.element_max_frequency),
            figure_cell(entry.array_area),
            figure_cell(entry.max_frequency),
            figure_cell(entry.peak),
            figure_cell(entry.density),
        ]
        for entry in result.gates
    ]
    parts.append(
        table_block(
            ["engine / cells", "formats", "element", "element, fastest", "array", "array frequency", "peak", "density"],
            rows,
        )
    )
    parts.append('<div class="plots">' + plot_block(area_plot(result.gates), "Area by component [synthesised]", True))
    parts.append("</div><h2>What it costs</h2>")
    for phase in dict.fromkeys(entry.phase for entry in result.phases):
        rows = [
            [
                html.escape(_label(entry)),
                figure_cell(entry.cycles),
                figure_cell(entry.utilisation),
                figure_cell(entry.time),
                figure_cell(entry.tokens_per_second),
                figure_cell(entry.array_energy_per_mac),
                figure_cell(entry.energy_per_token),
                figure_cell(entry.memory_traffic),
            ]
            for entry in result.phases
            if entry.phase == phase
        ]
        columns = [
            "engine / cells",
            "cycles",
            "utilisation",
            "time",
            "speed",
            "array energy",
            "energy/token",
            "traffic",
        ]
        parts.append(f"<h3>{html.escape(phase)}</h3>" + table_block(columns, rows))
    parts.append('<div class="plots">')
    for phase in dict.fromkeys(entry.phase for entry in result.phases):
        accuracy = accuracy_plot(result, phase)
        if accuracy is not None:
            title = f"Perplexity [executed] against energy per token [predicted], {phase}"
            parts.append(plot_block(accuracy, title, True))
    parts.append(plot_block(energy_plot(result.phases), "Energy per token by component", True))
    parts.append(plot_block(roofline_plot(result.phases, result.roofline), "Roofline [predicted]", True, 440))
    for entry in result.phases:
        title = f"{entry.phase} on {_label(entry)}"
        parts.append(plot_block(layer_time_plot(entry), f"Time by operator, {title} [predicted]"))
        parts.append(plot_block(entry.schedule.gantt(), f"Timeline, {title} [predicted]"))
    parts.append("</div>")
    parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in result.notes) + "</ul>")
    checks = [f"{_label(entry)}: {check}" for entry in result.gates for check in entry.checks]
    parts.append("<h2>Checks</h2><ul>" + "".join(f"<li>{html.escape(check)}</li>" for check in checks) + "</ul>")
    parts.append("<h2>Sources</h2>")
    for gates in {gates.engine: gates for gates in result.gates}.values():
        parts.append(
            f"<details><summary>Verilog of {html.escape(gates.engine)}</summary>"
            f"<pre>{html.escape(gates.verilog)}</pre></details>"
        )
    study = html.escape(json.dumps(result.inputs, indent=2))
    versions = html.escape(json.dumps(dict(result.versions), indent=2))
    parts.append(f"<details><summary>Study and versions</summary><pre>{study}\n{versions}</pre></details>")
    return document(result.title, "\n".join(parts))


_SORT = r"""
const units={p:1e-12,n:1e-9,u:1e-6,'µ':1e-6,m:1e-3,k:1e3,M:1e6,G:1e9,T:1e12};
function key(row,at){
  const text=row.cells[at].innerText.replace(/,/g,'');
  const found=text.match(/^(-?[\d.]+(?:e[-+]?\d+)?)\s*([pnuµmkMGT](?=[A-Za-z]))?/);
  return found?found[1]*(units[found[2]]||1):text;
}
document.querySelectorAll('th').forEach(head=>head.addEventListener('click',()=>{
  const body=head.closest('table').tBodies[0],at=[...head.parentNode.children].indexOf(head);
  const sign=head.dataset.sign=head.dataset.sign=='1'?'-1':'1';
  [...body.rows].sort((x,y)=>(key(x,at)>key(y,at)?1:-1)*sign).forEach(row=>body.append(row));
}));
"""


def document(title: str, body: str) -> str:
    """A whole self-contained page; a click on a table heading sorts by that column."""
    library: Any = get_plotlyjs()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><script>{library}</script></head>'
        f"<body>{body}<script>{_SORT}</script></body></html>\n"
    )
