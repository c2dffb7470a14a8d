"""Draw the pictures of the page "From a loop nest to gates": where area goes, and area against energy.

    python benchmarks/engine_figures.py [LIBRARY]

Writes docs/images/engine-components.png and docs/images/engine-efficiency.png (HTML beside them when no headless
Chromium is installed to take the picture).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from bitwright.engine.component_areas import component_areas
from bitwright.engine.engine_gates import engine_gates
from bitwright.engine.libraries import find_library
from bitwright.engine.tensor_engine import TensorEngine

IMAGES = Path(__file__).parent.parent / "docs" / "images"
ENGINES = {
    "MAC": ((), "mbe"),
    "MAC, sign-free": (("sign_free",), "mbe"),
    "MAC, sign-free, pipelined": (("sign_free", "pipeline p"), "mbe"),
    "MAC, sign-free, cut at the pair": (("sign_free", "pipeline p_s", "retime_add p"), "mbe"),
    "OPT1": (("opt1",), "mbe"),
    "OPT1, sign-free": (("opt1", "sign_free"), "mbe"),
    "OPT1, sign-free, pipelined": (("opt1", "sign_free", "pipeline pp"), "mbe"),
    "OPT2, sign-free": (("opt2", "hoist_encode", "sign_free"), "mbe"),
    "OPT3": (("opt3",), "ent"),
    "OPT4C": (("opt4c",), "ent"),
    "OPT4C, carry-in, sign-free": (("opt4c", "carry_in_negation", "sign_free"), "ent"),
    "OPT4E": (("opt4e",), "ent"),
    "OPT4E, carry-in, sign-free": (("opt4e", "carry_in_negation", "sign_free"), "ent"),
    "6 lanes, carry-in, sign-free, three stages": (
        ("opt4c", "lanes 6", "carry_in_negation", "sign_free", "reduce_apart acc_s", "pipeline m acc_s_in"),
        "ent",
    ),
    "8 lanes, carry-in, sign-free": (("opt4c", "lanes 8", "carry_in_negation", "sign_free"), "ent"),
}
SPLIT = ("MAC", "OPT1", "OPT1, sign-free, pipelined", "OPT2, sign-free", "OPT4C", "OPT4E, carry-in, sign-free")


def engine(name: str) -> TensorEngine:
    """A 16x16 output-stationary array of that kind."""
    transformations, encoding = ENGINES[name]
    return TensorEngine(16, 16, transformations, encoding=encoding)


def components(library_name: str) -> go.Figure:
    """Stacked bars: area of one element by component."""
    library = find_library(library_name)
    split = {name: component_areas(engine(name), library) for name in SPLIT}
    figure = go.Figure()
    for component in ("registers", "compressor", "adders", "partial products", "encoder", "optimised together"):
        figure.add_bar(name=component, x=list(SPLIT), y=[split[name].get(component, 0) for name in SPLIT])
    figure.update_layout(
        barmode="relative", title=f"Area of one element by component, {library_name} [synthesised]",
        yaxis_title="cell area (um2)", template="plotly_white", height=560, margin_t=70,
    )  # fmt: skip
    return figure


def efficiency(library_name: str) -> go.Figure:
    """Area x period against energy, both per multiply-accumulate: to the lower left is better."""
    library = find_library(library_name)
    gates = {name: engine_gates(engine(name), library) for name in ENGINES}
    figure = go.Figure()
    for kind, chosen in (("baselines", [name for name in ENGINES if name.startswith("MAC")]),
                         ("transformed", [name for name in ENGINES if not name.startswith("MAC")])):  # fmt: skip
        figure.add_scatter(
            name=kind, mode="markers+text", text=chosen, marker_size=11,
            textposition="middle right" if kind == "baselines" else "top center",
            x=[1e3 / (1e-6 * gates[name].area_efficiency) * 1e-3 for name in chosen],
            y=[gates[name].energy_j_per_mac * 1e12 for name in chosen],
        )  # fmt: skip
    figure.update_layout(
        title=f"16x16 arrays, normal INT8 operands, K = 768, {library_name} [synthesised, simulated activity]",
        xaxis_range=[25, 130],
        xaxis_title="area x period per multiply-accumulate (um2 us)",
        yaxis_title="energy per multiply-accumulate (pJ)",
        template="plotly_white", height=560, margin_t=70,
    )  # fmt: skip
    return figure


def save(figure: go.Figure, name: str) -> Path:
    """Write the figure as a picture, or as HTML when there is no browser to draw it."""
    page = figure.to_html(include_plotlyjs=True, full_html=True, config={"displayModeBar": False})
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        target = IMAGES / f"{name}.html"
        target.write_text(page)
        return target
    target = IMAGES / f"{name}.png"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "figure.html"
        source.write_text(page)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,660",
                 "--virtual-time-budget=6000", f"--user-data-dir={folder}/profile"]  # fmt: skip
        subprocess.run(
            [browser, *flags, f"--screenshot={folder}/out.png", source.as_uri()],
            check=True,
            timeout=120,
            capture_output=True,
        )
        shutil.copyfile(f"{folder}/out.png", target)
    return target


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else "osu018"
    for made, title in ((components(chosen), "engine-components"), (efficiency(chosen), "engine-efficiency")):
        print(save(made, title))
