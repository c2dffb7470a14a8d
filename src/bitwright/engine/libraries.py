"""Finding a cell library by name or path."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from bitwright.core.errors import InputError, UnknownNameError
from bitwright.engine.liberty import Library, read_liberty
from bitwright.engine.predictive_library import PROCESSES, predictive_library

# Where Debian's qflow-tech-osu018 and a qflow built from source put the OSU 180 nm cells.
_OSU018 = tuple(Path(root) / "qflow/tech/osu018/osu018_stdcells.lib" for root in ("/usr/share", "/usr/local/share"))


def library_names() -> tuple[str, ...]:
    """Names `find_library` knows on this machine."""
    return (*PROCESSES, *(["osu018"] if any(path.is_file() for path in _OSU018) else []))


def find_library(name: str) -> Library:
    """A built-in library, `osu018` where Debian's `qflow-tech-osu018` is installed, or a Liberty file by its path.

    Raises UnknownNameError listing the known names, InputError for an unreadable file or an osu018 that is not there.
    """
    if name in PROCESSES:
        return predictive_library(name)
    if name == "osu018":
        for path in _OSU018:
            if path.is_file():
                return _read(path, path.stat().st_mtime_ns)
        raise InputError("The osu018 cells are not installed: `apt install qflow-tech-osu018`, or use "
                         f"{', '.join(PROCESSES)} or a Liberty file.")  # fmt: skip
    path = Path(name).expanduser()
    if path.is_file():
        return _read(path.resolve(), path.stat().st_mtime_ns)
    if path.suffix in (".lib", ".liberty", ".gz") or "/" in name:
        raise InputError(f"There is no cell library at {name}.")
    raise UnknownNameError("cell library (a path to a Liberty file is possible too)", name, library_names())


@cache
def _read(path: Path, modified_ns: int) -> Library:
    return read_liberty(path)
