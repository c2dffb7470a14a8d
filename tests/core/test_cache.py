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


@pytest.mark.parametrize(
    "damage", ["null", "{}", "[" * 200000, "[1]", '{"value": {}}', '{"value": null, "digest": "0"}', "VALUE"]
)
def test_an_entry_of_another_shape_or_value_is_computed_again(folder, damage):
    compute, calls = count_calls({"area": 1.5, "parts": {"pe": 2}})
    cache.get_or_compute("gates", {"x": 1}, compute)
    entry = next(folder.glob("*/*.json"))
    entry.write_text(entry.read_text().replace("1.5", "2.5") if damage == "VALUE" else damage)
    for _ in range(2):
        assert cache.get_or_compute("gates", {"x": 1}, compute) == {"area": 1.5, "parts": {"pe": 2}}
    assert len(calls) == 2


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None]}, 0.1 + 0.2, {"tuple": (1, 2)}, [float("inf")], "text"])
def test_whole_entries_are_read_back(value):
    compute, calls = count_calls(value)
    first = cache.get_or_compute("gates", {"y": 1}, compute)
    second = cache.get_or_compute("gates", {"y": 1}, compute)
    assert len(calls) == 1
    assert json.dumps(first) == json.dumps(second)


def test_a_cache_that_cannot_be_used_is_refused_before_the_work(folder, monkeypatch):
    compute, calls = count_calls(1)
    for limit in ("many", "-1 GiB"):
        monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", limit)
        with pytest.raises(InputError, match="BITWRIGHT_CACHE_LIMIT"):
            cache.get_or_compute("gates", {"x": 1}, compute)
    monkeypatch.delenv("BITWRIGHT_CACHE_LIMIT")
    folder.parent.joinpath("file").write_text("")
    monkeypatch.setenv("BITWRIGHT_CACHE", str(folder.parent / "file"))
    with pytest.raises(InputError, match=r"cannot be written.*BITWRIGHT_CACHE"):
        cache.get_or_compute("gates", {"x": 1}, compute)
    assert not calls
