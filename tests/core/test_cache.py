import json
import os

import pytest

from bitwright.core import cache, files
from bitwright.core.errors import BitwrightError, InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def count_calls(value):
    calls = []

    def compute():
        calls.append(1)
        return value

    return compute, calls


def test_a_result_is_computed_once_per_input():
    compute, calls = count_calls({"area": 1.5})
    for _ in range(3):
        assert cache.get_or_compute("gates", {"source": b"module", "version": 1}, compute) == {"area": 1.5}
    assert len(calls) == 1
    cache.get_or_compute("gates", {"source": b"module", "version": 2}, compute)
    assert len(calls) == 2


def test_a_file_is_hashed_by_its_contents(tmp_path):
    library = tmp_path / "cells.lib"
    library.write_text("a")
    first = cache.content_key({"library": library})
    library.write_text("b")
    assert cache.content_key({"library": library}) != first


def test_a_damaged_entry_is_computed_again(folder):
    compute, calls = count_calls(7)
    cache.get_or_compute("gates", {"x": 1}, compute)
    entry = next(folder.glob("*/*.json"))
    entry.write_text(entry.read_text()[:10])
    assert cache.get_or_compute("gates", {"x": 1}, compute) == 7
    assert len(calls) == 2


def test_a_failing_or_interrupted_computation_leaves_nothing(folder):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_compute("gates", {"x": 1}, interrupted)
    assert not list(folder.glob("**/*.json"))
    assert not list(folder.glob("**/.*"))


def test_the_entries_used_longest_ago_go_first(folder, monkeypatch):
    for index in range(3):
        cache.get_or_compute("gates", {"x": index}, lambda: "v" * 1000)
        for entry in folder.glob("*/*.json"):
            stat = entry.stat()
            os.utime(entry, (stat.st_atime - 10, stat.st_mtime - 10))
    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", "2500 B")
    cache.get_or_compute("gates", {"x": 3}, lambda: "v" * 1000)
    left = sorted(json.loads(entry.read_text())["inputs"]["x"] for entry in folder.glob("*/*.json"))
    assert left == [2, 3]


def test_show_and_clear_by_kind():
    cache.get_or_compute("gates", {"x": 1}, lambda: 1)
    cache.get_or_compute("perplexity", {"x": 1}, lambda: 1)
    assert [use.kind for use in cache.usage()] == ["gates", "perplexity"]
    with pytest.raises(InputError, match="gates, perplexity"):
        cache.clear("synthesis")
    assert cache.clear("gates") == 1
    assert [use.kind for use in cache.usage()] == ["perplexity"]
    assert cache.clear() == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    files.write_json(path, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(BitwrightError, match="No space left"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
