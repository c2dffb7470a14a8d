"""The format table: rows, exact storage, retrieval drift, what is cached, and its outputs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitwright.arithmetic import formats
from bitwright.core.errors import BitwrightError, InputError
from bitwright.core.quantity import Evidence, Quantity
from bitwright.models.decoder import Decoder, DecoderConfig
from bitwright.models.format_execution import FormatAssignment
from bitwright.models.perplexity import packaged_text
from bitwright.models.retrieval import openings, retrieval_drift
from bitwright.study import format_table as module
from bitwright.study.format_errors import EXAMPLES, file_errors, normal_error
from bitwright.study.format_hardware import engine_for
from bitwright.study.format_table import (
    FormatRow,
    RowResult,
    TableSetup,
    default_rows,
    execute_row,
    format_table,
    read_rows,
    storage,
)
from bitwright.study.format_table_page import on_front, to_json, write_table

CONFIG = DecoderConfig(64, 64, 2, 4, 2, 32, 96)


def test_default_rows_are_distinct_and_parse() -> None:
    rows = default_rows()
    assert len(rows) >= 14
    assert len({row.name for row in rows}) == len({row.assignment for row in rows}) == len(rows)
    assert rows[0].assignment == FormatAssignment()


def test_storage_counts_every_stored_bit() -> None:
    model = Decoder(CONFIG)
    names = FormatAssignment("int4/32", "int8/row", "bfp12_32", "mxfp8_e4m3")
    found = {name: figure.value for name, figure in storage(model, names, 10).items()}
    weights = np.random.default_rng(0).normal(size=(1, 1))
    packed = 0
    form = formats.parse("int4/32")
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            packed += form.pack(form.encode(layer.weight.detach())).size
    assert found["weight traffic"] == packed
    assert found["weight bits"] == 5.0
    cached = [formats.parse(name) for name in ("bfp12_32", "mxfp8_e4m3")]
    token = sum(each.pack(each.encode(np.ones((4, 32), np.float32))).size for each in cached)  # 2 layers x 2 heads
    assert found["KV traffic"] == 11 * token
    assert found["KV bits"] == (4.25 + 8.25) / 2
    assert found["traffic"] == packed + 11 * token
    # inputs: 3 x 64 and 128 in attention, 2 x 64 and 96 in the feed-forward of 2 layers, 64 for the head
    vectors = [64] * 3 + [128] + [64] * 2 + [96]
    total = 2 * sum(8 * size + 32 for size in vectors) + 8 * 64 + 32
    assert found["activation bits"] == pytest.approx(total / (2 * sum(vectors) + 64))
    assert weights.size == 1
    plain = storage(model, FormatAssignment(), 10)
    assert plain["weight bits"].value == plain["KV bits"].value == 32


def test_retrieval_drift_counts_first_places() -> None:
    reference = torch.eye(4).repeat(2, 1, 1)
    same = retrieval_drift(reference, reference)
    assert (same.cosine, same.recall, same.reference_recall, same.agreement) == (1, 1, 1, 1)
    changed = reference.clone()
    changed[0, 0] = torch.tensor([0.0, 1, 0, 0])  # query 0 now finds passage 1
    moved = retrieval_drift(changed, reference)
    assert (moved.recall, moved.agreement) == (0.75, 0.75)
    assert moved.cosine == pytest.approx(7 / 8)
    with pytest.raises(InputError, match="expected equal"):
        retrieval_drift(reference, reference[:, :2])


def test_openings_are_those_of_the_sentences() -> None:
    text = "One two three four. Short. " + " ".join(f"w{i}" for i in range(12)) + ". " + "x " * 15
    assert openings(text, 2, 12) == (
        ["w0 w1 w2 w3", "x x x x x"],
        [" ".join(f"w{i}" for i in range(12)), ("x " * 15)[:-1]],
    )
    with pytest.raises(InputError, match="holds 2"):
        openings(text, 3, 12)
    queries, passages = openings(packaged_text("kjv-kings.txt").content, 200)
    assert len(set(passages)) == 200
    assert all(passage.startswith(query) for query, passage in zip(queries, passages, strict=True))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FormatAssignment]:
    """Rows that take no time: what is executed, in order."""
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    runs: list[FormatAssignment] = []

    def execute(assignment: FormatAssignment, setup: TableSetup) -> dict[str, Any]:
        if assignment.weights == "int2/row":
            raise KeyboardInterrupt
        runs.append(assignment)
        figure = Quantity(float(len(runs)), "", Evidence.EXECUTED)
        return {name: figure.to_json() for name in ("perplexity", "traffic", "weight bits")}

    monkeypatch.setattr(module, "_execute", execute)
    monkeypatch.setattr(module, "_ids", lambda setup: None)
    return runs


def test_interrupted_tables_go_on(counted: list[FormatAssignment]) -> None:
    rows = [FormatRow(name, FormatAssignment(name)) for name in ("int8/row", "int2/row", "int4/row")]
    with pytest.raises(BitwrightError, match="1 of 3 rows"):
        format_table(rows, TableSetup(1, 8), 1)
    again = format_table([rows[0], rows[2]], TableSetup(1, 8), 1)
    assert [row.weights for row in counted] == ["int8/row", "int4/row"]
    assert [result.figures["perplexity"].value for result in again] == [1, 2]
    execute_row(rows[0].assignment, TableSetup(2, 8))  # another setup is another result
    assert len(counted) == 3


def result(name: str, perplexity: float, **axes: float) -> RowResult:
    figures = {"perplexity": perplexity, **{key.replace("_", " "): value for key, value in axes.items()}}
    made = {key: Quantity(value, "", Evidence.EXECUTED) for key, value in figures.items()}
    return RowResult(FormatRow(name, FormatAssignment()), made, {"PE area": "no hardware yet"})


def test_front_and_outputs(tmp_path: Path) -> None:
    results = (
        result("a", 10, traffic=5), result("b", 12, traffic=3), result("c", 12, traffic=4), result("<d>", 9),
        result("e", 11, traffic=9, energy_per_MAC=1e-12),
    )  # fmt: skip
    assert [each.row.name for each in on_front(results, "traffic")] == ["b", "a"]
    assert [each.row.name for each in on_front(results, "energy per MAC")] == ["e"]
    assert on_front(results, "weight bits") == ()
    page, data = write_table(results, TableSetup(3, 16), tmp_path)
    stored = json.loads(data.read_text())
    assert stored == json.loads(json.dumps(to_json(results, TableSetup(3, 16))))
    assert [row["name"] for row in stored["rows"]] == ["a", "b", "c", "<d>", "e"]
    assert stored["rows"][4]["figures"]["energy per MAC"] == {"value": 1e-12, "unit": "", "evidence": "executed"}
    text = page.read_text()
    assert "&lt;d&gt;" in text
    assert "<td><d>" not in text
    assert "no hardware yet" in text


def test_rows_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text("- {name: mine, weights: int4/32, accumulation: bf16/16}\n- {keys: bfp12_32}\n")
    assert read_rows(path) == (
        FormatRow("mine", FormatAssignment("int4/32", accumulation="bf16/16")),
        FormatRow("keys bfp12_32", FormatAssignment(keys="bfp12_32")),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("[1]", "row 1 is 1"),
        ("- {weight: int8}", "row 1 has weight; known are accumulation"),
        ("- {weights: int4/32}\n- {weights: posit}", "row 2: Unknown number format"),
        ("- {weights: int4/32}\n- {weights: int4/32}", "Two rows"),
        ("- [", "is not valid YAML: line 1"),
    ],
)
def test_unusable_rows(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(path)


def test_setup_is_checked() -> None:
    with pytest.raises(InputError, match="at least 1"):
        TableSetup(0)
    with pytest.raises(InputError, match=r"holds \d+"):
        format_table(default_rows()[:1], TableSetup(65, 1024), 1)
    with pytest.raises(InputError, match="no rows"):
        format_table([])


def test_engines_multiply_the_codes_of_both_operands() -> None:
    mixed = engine_for(FormatAssignment("int4/32", "int8/row"))
    assert mixed is not None
    assert (mixed.a_bits, mixed.b_bits) == (8, 4)
    assert engine_for(FormatAssignment("mxfp4", "mxfp4")) == engine_for(FormatAssignment("fp4_e2m1/row", "mxfp4"))
    assert engine_for(FormatAssignment("int4/32")) is None
    widths = {"int8/row": 16 + 10, "int4/32": 8 + 10, "ovp4/row": 15 + 10}  # products that are made, sums of 1024
    for name, bits in widths.items():
        engine = engine_for(FormatAssignment(name, name))
        assert engine is not None
        assert engine.accumulator_bits == bits
    assert engine_for(FormatAssignment("fp8_e5m2/row", "fp8_e5m2/row")) is None


def test_errors_of_files_and_normal_data(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    x = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    save_file({"w": x, "bias": x[0], "other": 2 * x}, tmp_path / "x.safetensors")
    save_file({"w": np.ones((2, 4), np.int32)}, tmp_path / "integers.safetensors")
    (tmp_path / "nothing.npy").write_bytes(b"")
    np.save(tmp_path / "empty.npy", np.zeros((0, 2), np.float32))
    np.save(tmp_path / "single.npy", np.float32(1))
    (one,) = file_errors("mxfp4", tmp_path / "x.npy")
    assert one.statistics == formats.error_statistics(formats.parse("mxfp4"), x)
    assert [each.tensor for each in file_errors("mxfp4", tmp_path / "x.safetensors")] == ["other", "w"]
    assert file_errors("mxfp4", tmp_path / "x.safetensors", "w")[0].statistics == one.statistics
    assert one.to_json()["bits_per_element"] == 4.25
    for name in EXAMPLES:
        assert normal_error(name).statistics.sqnr_db > 10
    for path, tensor, message in (
        ("y.npy", None, "Cannot read"), ("x.txt", None, "neither"), ("x.safetensors", "v", "no tensor 'v'"),
        ("nothing.npy", None, "Cannot read"), ("empty.npy", None, "round floating-point"),
        ("single.npy", None, "round floating-point"), ("integers.safetensors", None, "int32"),
        ("x.npy", "w", "holds one array"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            file_errors("mxfp4", tmp_path / path, tensor)


@pytest.mark.slow
def test_a_row_executes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    rows = [FormatRow("fp32", FormatAssignment()), FormatRow("int8", FormatAssignment("int8/row", "int8/row"))]
    plain, rounded = format_table(rows, TableSetup(1, 128, sentences=8), 1)
    assert plain.figures["embedding cosine"].value == pytest.approx(1)
    assert plain.figures["same first passage"].value == 1
    assert 0.99 < rounded.figures["embedding cosine"].value < 1
    ratio = rounded.figures["perplexity"].value / plain.figures["perplexity"].value
    assert 0.9 < ratio < 1.2
    assert ratio != 1
