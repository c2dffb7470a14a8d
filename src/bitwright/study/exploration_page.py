"""The outputs of an exploration: one HTML page, the figures as JSON, and the Verilog of every engine on the front."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from bitwright.core.files import write_json, write_whole
from bitwright.core.quantity import Evidence, Quantity
from bitwright.engine.engine_gates import small_engine
from bitwright.engine.notation import print_nest
from bitwright.engine.rtl import parts, rtlil_text, verilog
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.study.exploration import ExplorationResult, Point
from bitwright.study.output import check_folder
from bitwright.study.page import document, figure_cell, plot_block, table_block

_SCHEMA = 1


def figures(point: Point) -> dict[str, Quantity]:
    """What the report shows of a point."""
    source = f"{point.library} cells, parts mapped once and counted, before placement"
    energy = "gate activity of normal operands without delays, over the cycles of the products"
    return {
        "area": Quantity(point.area_um2, "um2", Evidence.SYNTHESISED, source),
        "clock": Quantity(1 / point.gates.period_s, "Hz", Evidence.SYNTHESISED, source),
        "throughput": Quantity(
            2 * point.macs_per_second / 1e12, "TOP/s", Evidence.PREDICTED, "cycle model of the products at that clock"
        ),
        "energy per multiply-accumulate": Quantity(point.energy_j_per_mac, "J", Evidence.PREDICTED, energy),
    }


def to_json(result: ExplorationResult) -> dict[str, Any]:
    """The whole result as JSON values."""
    return {
        "schema": _SCHEMA,
        "name": result.name,
        "points": [
            {
                "name": point.name, "library": point.library, "dataflow": point.engine.dataflow,
                "rows": point.engine.rows, "columns": point.engine.columns, "depth": point.engine.depth,
                "transformations": list(point.engine.transformations), "encoding": point.engine.encoding,
                "a_bits": point.engine.a_bits, "b_bits": point.engine.b_bits,
                "accumulator_bits": point.engine.accumulator_bits,
                "recipe": point.gates.recipe, "on_front": point.on_front,
                "figures": {name: value.to_json() for name, value in figures(point).items()},
            }
            for point in result.points
        ],
        "refused": dict(result.refused),
    }  # fmt: skip


def write_exploration(result: ExplorationResult, folder: Path) -> list[Path]:
    """Write exploration.html, exploration.json and front/*.v; returns their paths. Raises InputError for the folder."""
    check_folder(folder)
    (folder / "front").mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    sources: dict[int, Path] = {}
    for index, point in enumerate(result.front):
        sources[index] = folder / "front" / f"engine_{index}.v"
        write_whole(sources[index], _verilog(point))
        written.append(sources[index])
    page, data = folder / "exploration.html", folder / "exploration.json"
    write_whole(page, _page(result, {index: path.relative_to(folder) for index, path in sources.items()}))
    write_json(data, to_json(result))
    return [page, data, *written]


def _verilog(point: Point) -> str:
    """The modules the engine is made of, which do not depend on its size, and how to generate the rest."""
    engine = point.engine
    options = " ".join(f"-t '{line}'" for line in engine.transformations)
    sizes = f"--rows {engine.rows} --columns {engine.columns} --depth {engine.depth}"
    widths = f"--a-bits {engine.a_bits} --b-bits {engine.b_bits} --accumulator-bits {engine.accumulator_bits}"
    command = f"bitwright engine generate --dataflow {engine.dataflow} {sizes} {options} --encoding {engine.encoding}"
    head = f"// {point.name}, {point.library}\n// The whole engine: {command} {widths}\n"
    return head + _modules(small_engine(engine))


@cache
def _modules(engine: TensorEngine) -> str:
    return verilog({part.name: rtlil_text(part) for part in parts(engine)})


def _page(result: ExplorationResult, sources: dict[int, Path]) -> str:
    blocks = [
        f"<h1>{html.escape(result.name)}</h1><p>{len(result.points)} engines, {len(result.front)} on the front.</p>"
    ]
    blocks.append(plot_block(_scatter(result), "Area against energy; to the lower left is better"))
    blocks.append("<h2>Pareto front: area, energy, throughput</h2>" + _table(result.front))
    for index, point in enumerate(result.front):
        nest = html.escape(print_nest(point.engine.nest))
        blocks.append(
            f"<details><summary>{html.escape(point.name)}, {html.escape(point.library)}</summary>"
            f'<p><a href="{sources[index].as_posix()}">Verilog</a></p><pre>{nest}</pre></details>'
        )
    blocks.append("<h2>All engines</h2><details open><summary>table</summary>" + _table(result.points) + "</details>")
    if result.refused:
        rows = [[html.escape(name), html.escape(reason.splitlines()[0])] for name, reason in result.refused.items()]
        blocks.append("<h2>Not built</h2>" + table_block(["engine", "reason"], rows))
    return document(result.name, "".join(blocks))


def _scatter(result: ExplorationResult) -> go.Figure:
    figure = go.Figure()
    for label, chosen in (
        ("others", [point for point in result.points if not point.on_front]), ("front", list(result.front)),
    ):  # fmt: skip
        figure.add_scatter(
            name=label, mode="markers", x=[point.area_um2 for point in chosen],
            y=[point.energy_j_per_mac * 1e12 for point in chosen],
            text=[f"{point.name}<br>{2 * point.macs_per_second / 1e12:.3g} TOP/s" for point in chosen],
            marker={"size": [6 + min(24, 4 * (point.macs_per_second / 1e11) ** 0.5) for point in chosen]},
        )  # fmt: skip
    figure.update_xaxes(title="area (um2)", type="log")
    figure.update_yaxes(title="energy per multiply-accumulate (pJ)", type="log")
    return figure


def _table(points: tuple[Point, ...]) -> str:
    rows = [
        [
            html.escape(point.name),
            html.escape(point.library),
            *(figure_cell(value) for value in figures(point).values()),
        ]
        for point in points
    ]
    return table_block(["engine", "library", "area", "clock", "throughput", "energy per MAC"], rows)
