"""Threads and instruction sets that native kernels use."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache

from bitwright.core.errors import InputError


def thread_count(threads: int | None) -> int:
    """`threads`, or as many as torch uses, or as there are cores. Raises InputError for fewer than one."""
    if threads is None:
        torch = sys.modules.get("torch")
        return int(torch.get_num_threads()) if torch is not None else len(os.sched_getaffinity(0))
    if threads < 1:
        raise InputError(f"{threads} threads asked for; expected at least one.")
    return threads


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def usable_path(path: str | None, paths: Sequence[str], fastest: str, what: str) -> str:
    """The instruction set that `what` ("bit-plane products") runs with: the one asked for, or the fastest here.

    `paths` lists those there is code for, the fastest first; `fastest` is the first of them that this CPU has. One
    that the CPU lacks is replaced by the fastest it has, with one warning. Raises InputError for names not in `paths`.
    """
    if path is None:
        path = paths[0]
    elif path not in paths:
        raise InputError(f"Instruction sets of {what} are {', '.join(paths)}, not {path!r}.")
    if paths.index(path) < paths.index(fastest):
        _warn_once(f"This CPU lacks the {path} instructions of {what}; using {fastest}.")
        return fastest
    return path
