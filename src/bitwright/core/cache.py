"""Expensive results kept by the hash of everything they depend on, in one folder the user can see, bound and clear.

The folder is `$BITWRIGHT_CACHE`, else the platform's user cache folder. Its size is bound by `$BITWRIGHT_CACHE_LIMIT`
(default "2 GiB"); the entries used longest ago go first. Entries are JSON: nothing in the folder is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from bitwright.core.errors import InputError
from bitwright.core.files import write_whole
from bitwright.core.quantity import parse_quantity


def folder() -> Path:
    """The cache folder (which need not exist yet)."""
    return Path(os.environ.get("BITWRIGHT_CACHE") or platformdirs.user_cache_dir("bitwright"))


def content_key(inputs: Mapping[str, Any]) -> str:
    """SHA-256 over `inputs`, which must be JSON values; bytes and paths are hashed by their contents."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=_digest).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    if isinstance(value, Path):
        return file_digest(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    raise TypeError(f"cannot hash a {type(value).__name__} into a cache key")


def get_or_compute(kind: str, inputs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Return the stored JSON value for (`kind`, `inputs`), computing and storing it when it is not there.

    `inputs` must hold everything the result depends on, a version number of the computing code included. An
    interrupted or failing `compute` stores nothing; a damaged entry is computed again. Raises InputError, before any
    work, for a cache folder that cannot be written and a limit that is no size.
    """
    path = folder() / kind / f"{content_key(inputs)}.json"
    found, value = _stored(path)
    if found:
        return value
    limit = _limit()
    _check_writable(path.parent)
    value = compute()
    entry = {
        "inputs": json.loads(json.dumps(inputs, default=_digest)), "value": value, "digest": _value_digest(value)
    }  # fmt: skip
    write_whole(path, json.dumps(entry))
    _bound(limit)
    return value


def _stored(path: Path) -> tuple[bool, Any]:
    """Whether an entry is there and whole, and its value."""
    try:
        entry = json.loads(path.read_text())
        if entry["digest"] == _value_digest(entry["value"]):
            os.utime(path)
            return True, entry["value"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return False, None


def _value_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_writable(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise InputError(
            f"The cache folder {target} cannot be written: {error.strerror or error}. Set BITWRIGHT_CACHE to a folder "
            "that can."
        ) from None


@dataclass(frozen=True)
class CacheUse:
    """Entries and bytes of one kind of result."""

    kind: str
    entries: int
    bytes: int


def _entries() -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder().glob("*/*.json"):
        try:
            found.append((path, path.stat()))
        except OSError:  # removed meanwhile by another process
            continue
    return found


def usage() -> list[CacheUse]:
    """What the cache holds, by kind of result."""
    kinds: dict[str, tuple[int, int]] = {}
    for path, stat in _entries():
        entries, size = kinds.get(path.parent.name, (0, 0))
        kinds[path.parent.name] = (entries + 1, size + stat.st_size)
    return [CacheUse(kind, *use) for kind, use in sorted(kinds.items())]


def clear(kind: str | None = None) -> int:
    """Remove every entry, or those of one kind; returns the number removed.

    Raises InputError when `kind` is a name the cache does not hold.
    """
    known = {use.kind for use in usage()}
    if kind is not None and kind not in known:
        raise InputError(
            f"The cache holds nothing of kind {kind!r}. It holds: {', '.join(sorted(known)) or 'nothing'}."
        )
    removed = 0
    for path, _ in _entries():
        if kind is None or path.parent.name == kind:
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _limit() -> float:
    text = os.environ.get("BITWRIGHT_CACHE_LIMIT", "2 GiB")
    try:
        limit = parse_quantity(text, "B")
    except InputError as error:
        raise InputError(f"BITWRIGHT_CACHE_LIMIT is no size: {error}") from None
    if limit < 0:
        raise InputError(f"BITWRIGHT_CACHE_LIMIT is {text}; expected a size of 0 B or more.")
    return limit


def _bound(limit: float) -> None:
    entries = sorted(_entries(), key=lambda entry: entry[1].st_mtime)
    total = sum(stat.st_size for _, stat in entries)
    for path, stat in entries[:-1]:  # the newest entry stays whatever its size
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size
