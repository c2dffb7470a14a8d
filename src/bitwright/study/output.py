"""The files of a study: report.html, results.json, one Perfetto trace per phase, one Verilog file per engine."""

from __future__ import annotations

from pathlib import Path

from bitwright.core.files import write_json, write_whole
from bitwright.study.page import render
from bitwright.study.result import StudyResult, to_json


def write_outputs(result: StudyResult, folder: Path) -> list[Path]:
    """Write every output of a study into `folder`, each file whole; returns their paths, the page first.

    Raises BitwrightError when the folder cannot be written or the disk is full.
    """
    page = folder / "report.html"
    write_whole(page, render(result))
    figures = folder / "results.json"
    write_json(figures, to_json(result))
    written = [page, figures]
    for gates in {entry.engine: entry for entry in result.gates}.values():
        path = folder / f"{gates.engine}.v"
        write_whole(path, gates.verilog)
        written.append(path)
    for phase in result.phases:
        path = folder / f"{phase.engine}-{Path(phase.library).stem}-{phase.phase}.trace.json"
        phase.schedule.write_trace(path)
        written.append(path)
    return written
