"""The files of a study: report.html, results.json, one Perfetto trace per phase, one Verilog file per engine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.files import write_json, write_whole
from bitwright.study.page import render
from bitwright.study.result import StudyResult, to_json


def check_folder(folder: Path) -> None:
    """Raise InputError when `folder` cannot become an output folder, which should be known before long work."""
    try:
        for place in (folder, *folder.parents):
            if place.is_dir():
                if not os.access(place, os.W_OK | os.X_OK):
                    raise InputError(f"Cannot write into {place}: it is read-only. Choose another output folder.")
                return
            if place.exists():
                raise InputError(f"Cannot write into {folder}: {place} is a file. Choose another output folder.")
    except OSError as error:
        raise InputError(f"Cannot use {folder} as output folder: {error.strerror or error}.") from error


def write_outputs(result: StudyResult, folder: Path) -> list[Path]:
    """Write every output of a study into `folder`, all files or none; returns their paths, the page first.

    Raises BitwrightError when the folder cannot be written or the disk is full.
    """
    check_folder(folder)
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-", ignore_cleanup_errors=True) as name:
            written = [folder / path.name for path in _write(result, Path(name))]
            for path in written:
                os.replace(Path(name) / path.name, path)
    except BaseException as error:
        for place in missing:  # innermost first; only what was made here, and only while empty
            with contextlib.suppress(OSError):
                place.rmdir()
        cause = error.__cause__ if isinstance(error, BitwrightError) else error
        if isinstance(cause, OSError):
            raise BitwrightError(f"Cannot write into {folder}: {cause.strerror or cause}.") from error
        raise
    return written


def _write(result: StudyResult, folder: Path) -> list[Path]:
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
