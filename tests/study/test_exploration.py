"""Exploration files, the Pareto front, and a small exploration down to gates."""

import json
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from bitwright.core.errors import InputError, ToolError
from bitwright.engine.engine_gates import EngineGates, part_gates
from bitwright.engine.tensor_engine import TensorEngine
from bitwright.study.exploration import Point, _engines, _with_front, explore, load_exploration, pareto
from bitwright.study.exploration_page import write_exploration

SMALL = """
name: small
dataflow: [os, tree]
shapes: [{rows: 2, columns: 2}, {rows: 1, columns: 4, depth: 1}]
transformations: [[], [opt1]]
widths: [{a_bits: 4, b_bits: 4, accumulator_bits: 14}]
products: [{m: 64, k: 64, n: 64}]
"""


def write(tmp_path, text):
    path = tmp_path / "exploration.yaml"
    path.write_text(text)
    return path


def test_pareto_against_pairs():
    figures = np.random.default_rng(0).integers(0, 4, (60, 3)).astype(float)
    for row, kept in enumerate(pareto(figures)):
        beaten = any((other <= figures[row]).all() and (other < figures[row]).any() for other in figures)
        assert kept != beaten


def test_points_share_gates_and_refusals_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    result = explore(load_exploration(write(tmp_path, SMALL)), tmp_path, processes=1)
    assert len(result.points) == 6
    assert len(result.refused) == 2
    assert all("one row" in reason for reason in result.refused.values())
    big, small = (
        next(
            p for p in result.points if p.engine.dataflow == "os" and p.engine.columns == c and p.engine.transformations
        )
        for c in (4, 2)
    )
    assert big.gates.part_area_um2["pe"] == small.gates.part_area_um2["pe"]
    written = write_exploration(result, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "exploration.json").read_text())
    assert len(data["points"]) == 6
    assert sum(point["on_front"] for point in data["points"]) == len(result.front) == len(written) - 2
    page = (tmp_path / "out" / "exploration.html").read_text()
    assert "half_reduce" in page or "accumulate" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[], [opt1]]", "[[opt9]]"), "opt9"),
        (("rows: 2", "rows: 0"), "shapes.0.rows"),
        (("[os, tree]", "[]"), "dataflow"),
        (("name: small", "name: small\nlibrary: [nowhere.lib]"), "nowhere"),
        (("name: small", "name: small\nencoding: [gray]"), "gray"),
        (("[[], [opt1]]", "[opt1]"), r"transformations: expected a list of sequences, .* \[\[\], \[opt1\]"),
        (("name: small", "name: small\nname: smaller"), "line 3.* the key 'name' appears twice"),
        (("name: small", "name: small\n1: 2"), "the key 1 is not text"),
        (("name: small", "name: " + "[" * 3000), "nested too deeply|not valid YAML"),
        (("m: 64", "m: 100000000000000000000"), "products.0.m"),
    ],
)
def test_bad_files_name_the_key(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_exploration(write(tmp_path, SMALL.replace(*change)))


def test_an_illegal_sequence_shows_the_nest_and_the_rule(tmp_path):
    exploration = load_exploration(write(tmp_path, SMALL.replace("[[], [opt1]]", "[[hoist_shift]]")))
    with pytest.raises(InputError, match=r"Rule 2(.|\n)*nest multiply-accumulate"):
        explore(exploration, tmp_path)


def test_a_point_whose_state_cannot_hold_the_products_is_refused(tmp_path):
    text = SMALL.replace("[[], [opt1]]", "[[opt2]]").replace("[os, tree]", "[os]")
    text = text.replace("accumulator_bits: 14", "accumulator_bits: 9")
    with pytest.raises(InputError, match=r"Rule 6 .*'acc_s' has 7 bits; sums over K = 64 .*up to 3 is safe"):
        explore(load_exploration(write(tmp_path, text)), tmp_path, processes=1)


def test_ray_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ToolError, match=r"pip install .bitwright\[ray\]"):
        explore(load_exploration(write(tmp_path, SMALL)), tmp_path, ray="auto")


@pytest.mark.parametrize("address", ["nonsense", "ray://:6379", "localhost:99999", "localhost:"])
def test_bad_addresses_of_a_cluster(tmp_path, monkeypatch, address):
    monkeypatch.setitem(__import__("sys").modules, "ray", SimpleNamespace())
    with pytest.raises(InputError, match="HOST:PORT"):
        explore(load_exploration(write(tmp_path, SMALL)), tmp_path, ray=address)


def test_a_cluster_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", SimpleNamespace())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # not listening, and nobody else can
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ToolError, match=f"No Ray cluster answers at {address}"):
            explore(load_exploration(write(tmp_path, SMALL)), tmp_path, ray=address)


def test_points_named_twice_are_evaluated_once(tmp_path):
    text = SMALL.replace("[os, tree]", "[os, os]").replace("[[], [opt1]]", "[[opt1], [opt1]]")
    engines, _ = _engines(load_exploration(write(tmp_path, text)))
    assert len(engines) == len(set(engines)) == 2  # two shapes


def test_every_reason_is_listed_when_nothing_can_be_built(tmp_path):
    text = SMALL.replace("[[], [opt1]]", "[[hoist_shift], [opt2, opt2]]").replace("[os, tree]", "[os]")
    with pytest.raises(InputError) as raised:
        explore(load_exploration(write(tmp_path, text)), tmp_path, processes=1)
    assert "hoist_shift, mbe" in str(raised.value)
    assert "opt2, opt2, mbe" in str(raised.value)


def test_a_fault_in_one_point_does_not_take_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))

    def faulty(engine, *arguments):
        if engine.transformations:
            raise KeyError("kb")
        return part_gates(engine, *arguments)

    monkeypatch.setattr("bitwright.study.exploration.part_gates", faulty)
    result = explore(load_exploration(write(tmp_path, SMALL.replace("[os, tree]", "[os]"))), tmp_path, processes=1)
    assert {point.engine.transformations for point in result.points} == {()}
    assert any("fault of Bitwright" in reason and "KeyError: 'kb'" in reason for reason in result.refused.values())


def test_fronts_are_those_of_one_library_and_one_operand_width():
    """A point that another library or narrower operands beat is still on the front of its own."""

    def point(library, bits, area, b_bits=8):
        gates = EngineGates(library, {"pe": 1}, {"pe": area}, {"pe": 1e-12 * area}, 0.0, 0.0, 1e-9, 0.0, 1.0, "hand")
        return Point(TensorEngine(1, 1, a_bits=bits, b_bits=b_bits), library, gates, 10.0, 10)

    points = [point("x", 8, 4.0), point("x", 8, 5.0), point("y", 8, 2.0), point("x", 4, 1.0), point("x", 4, 3.0)]
    points.append(point("x", 8, 4.5, 4))
    assert [found.on_front for found in _with_front(points)] == [True, False, True, True, False, True]
