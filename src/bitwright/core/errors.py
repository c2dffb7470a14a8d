"""Errors: what was given, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BitwrightError(Exception):
    """Something could not be done; the message says what to do. The command line exits with `exit_code`."""

    exit_code = 1


class InputError(BitwrightError):
    """The user gave something that cannot be used: a wrong unit, an unknown key, a zero extent, a bad file."""

    exit_code = 2


class UnknownNameError(InputError):
    """A name that is not in a list; the message lists the known names and the nearest one."""

    def __init__(self, kind: str, given: str, known: Iterable[str]) -> None:
        names = sorted(known)
        longer = [name for name in names if given and name.startswith(given)]
        near = longer or difflib.get_close_matches(given, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"Unknown {kind} {given!r}.{hint} Known: {', '.join(names) or 'none'}.")


class ToolError(BitwrightError):
    """An external tool is missing, failed, or ran out of time."""
