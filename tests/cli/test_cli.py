"""The command line as a user meets it: a process, its two output streams and its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_MAIN = [sys.executable, "-c", "from bitwright.cli.main import main; main()"]
_STUDY = """
title: a [bold]study[/bold]
model: {name: smollm2-135m, window: 32, tokens: 64}
engines: [{name: mac, dataflow: os, rows: 2, columns: 2}]
buffer: {capacity: 64 KiB, energy: 12.5 pJ/B, source: somebody}
memory: lpddr5-6400
"""
_CELL = "cell (INV) { area : 1; pin (A) { direction : input; capacitance : 1; } pin (Y) { direction : output; %s } }"
_LIBERTY = "library (small) { nom_voltage : 1; " + _CELL + " }"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "temporary").mkdir()
    return {
        **os.environ, "BITWRIGHT_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "temporary"),
        "COLUMNS": "200", "NO_COLOR": "1",
    }  # fmt: skip


def run(environment: dict[str, str], *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_MAIN, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )  # type: ignore[call-overload,no-any-return]


def study_file(folder: Path, old: str = "", new: str = "") -> Path:
    path = folder / "study.yaml"
    assert old in _STUDY
    path.write_text(_STUDY.replace(old, new) if old else _STUDY)
    return path


def assert_one_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_commands_stand_in_the_order_of_a_study(environment: dict[str, str]) -> None:
    text = run(environment, "--help").stdout
    order = ["evaluate", "trace", "engine", "machine", "systems", "reproduce", "cache"]
    places = [text.index(f"│ {name} ") for name in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "command",
    ["evaluate", "trace", "engine generate", "engine verify", "engine synthesise",
     "engine transform", "engine cycles", "machine list", "machine show",
     "machine measure", "kernels list", "kernels bench", "systems", "reproduce", "cache show", "cache clear"],
)  # fmt: skip
def test_help_teaches_with_an_example_and_every_command_offers_json(command: str, environment: dict[str, str]) -> None:
    from typer.testing import CliRunner

    from bitwright.cli import cache, engine, evaluate, kernels, machine, systems, trace  # noqa: F401
    from bitwright.cli.main import app

    text = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"}).output
    assert f"Example: bitwright {command}" in " ".join(text.split())
    assert "--json" in text


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["trace", "nosuch"], ["'nosuch'", "llama-3-8b", "smollm2-135m"]),
        (["trace", "gpt2", "--machine", "nosuch"], ["'nosuch'", "a100-40g"]),
        (["trace", "gpt2", "--machine", ""], ["a100-40g"]),
        (["machine", "show", "nosuch"], ["'nosuch'", "a100-40g"]),
        (["engine", "generate", "-t", "nosuch"], ["'nosuch'", "opt1", "sign_free"]),
        (["engine", "generate", "-d", "nosuch"], ["'nosuch'", "matrix2d"]),
        (["engine", "generate", "-e", "nosuch"], ["'nosuch'", "mbe"]),
        (["engine", "generate", "--part", "nosuch"], ["'nosuch'", "output_stage"]),
        (["engine", "generate", "--nest", "--part", "pe"], ["one of --nest"]),
        (["engine", "generate", "-t", "split kt"], ["split INDEX FACTOR NAME"]),
        (["engine", "cycles", "0", "1", "1"], ["m is 0"]),
        (["engine", "cycles", "1", "1", "1", "--sigma", "3"], ["--sigma is for serial engines"]),
        (["engine", "transform", "no.txt"], ["no.txt"]),
        (["engine", "verify", "--netlist", "osu018", "--vcd", "x.vcd"], ["--netlist"]),
        (["engine", "verify", "--netlist", "nosuch"], ["'nosuch'", "predictive-28nm"]),
        (["engine", "synthesise", "--rows", "1", "--columns", "1", "-l", "nosuch"], ["'nosuch'", "predictive-28nm"]),
        (["systems", "nosuch"], ["'nosuch'", "bitweight-tpe"]),
        (["cache", "clear", "nosuch"], ["'nosuch'"]),
        (["engine", "generate", "--rows", "0"], ["rows is 0"]),
        (["trace", "gpt2", "--tokens", "0"], ["tokens is 0"]),
        (["machine", "show", "a100-40g", "--json", "--yaml"], ["not both"]),
    ],
)
def test_bad_names_and_extents(arguments: list[str], known: list[str], environment: dict[str, str]) -> None:
    assert_one_error(run(environment, *arguments), 2, *known)


def test_usage_errors_exit_with_2(environment: dict[str, str]) -> None:
    for arguments in (
        ["nosuch"], ["trace"], ["trace", "gpt2", "--tokens", "many"], ["systems", "--nosuch"],
        ["engine", "verify", "--seed", "-1"],
    ):  # fmt: skip
        done = run(environment, *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert "Usage:" in done.stderr


def test_planned_system_is_not_a_usage_error(environment: dict[str, str]) -> None:
    from bitwright.reproduce import catalogue

    planned = next(entry.slug for entry in catalogue.systems() if entry.status == catalogue.PLANNED)
    assert_one_error(run(environment, "reproduce", planned), 1, planned)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("64 KiB", "64 GHz", ["buffer.capacity", "64 GHz", "'B'"]),
        ("64 KiB", "64", ["buffer.capacity", "no unit"]),
        ("64 KiB", "1 bit", ["buffer.capacity", "at least"]),
        ("rows: 2", "rowz: 2", ["engines.0.rowz", "unknown key", "rows"]),
        ("rows: 2", "rows: 0", ["engines.0.rows", "given 0"]),
        ("rows: 2", "rows: true", ["engines.0.rows", "given True"]),
        ("rows: 2", "rows: 2, accumulator_bits: 16", ["accumulator bits can overflow"]),
        ("name: mac,", 'name: "[x]",', ["[a-z]", "given '[x]'"]),
        ("lpddr5-6400", "nosuch", ["'nosuch'", "lpddr5-6400"]),
        ("smollm2-135m", "nosuch", ["'nosuch'", "smollm2-135m"]),
        ("dataflow: os", "dataflow: nosuch", ["engines.0.dataflow", "nosuch", "matrix2d"]),
        ("dataflow: os", "transformations: [nosuch]", ["study.yaml", "'mac'", "'nosuch'", "sign_free"]),
        (
            "dataflow: os",
            "transformations: [hoist_shift]",
            ["study.yaml", "'mac'", "Rule 2", "`hoist_shift`", "par bw"],
        ),
        ("dataflow: os", "nest: x.txt", ["engines.0", "engine transform"]),
        ("title:", "seed: -1\ntitle:", ["seed", "given -1"]),
        ("title:", "libraries: []\ntitle:", ["libraries", "at least 1"]),
        ("title:", "libraries: [nosuch]\ntitle:", ["'nosuch'", "predictive-28nm"]),
        ("title:", "libraries: [./no.lib]\ntitle:", ["no cell library at ./no.lib"]),
        ("title:", "title: twice\ntitle:", ["'title' appears twice", "line 3"]),
        ("title:", "title: [", ["not valid YAML", "line"]),
    ],
)
def test_bad_studies(old: str, new: str, words: list[str], tmp_path: Path) -> None:
    from bitwright.core.errors import InputError
    from bitwright.study.evaluate import evaluate_study
    from bitwright.study.file import load_study

    with pytest.raises(InputError) as caught:
        evaluate_study(load_study(study_file(tmp_path, old, new)), tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_bad_study_leaves_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    path = study_file(tmp_path, "64 KiB", "64 GHz")
    done = run(environment, "evaluate", str(path), "-o", str(tmp_path / "out"))
    assert_one_error(done, 2, "buffer.capacity")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_debug_shows_the_traceback(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "--debug", "trace", "nosuch")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_truncated_gguf(environment: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (9).to_bytes(8, "little") * 2)
    assert_one_error(run(environment, "trace", str(broken)), 2, "broken.gguf")
    path = study_file(tmp_path, "smollm2-135m", "broken.gguf")  # a path is relative to the study
    assert_one_error(run(environment, "evaluate", str(path), "-o", str(tmp_path / "out")), 2, "broken.gguf")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (_LIBERTY % 'function : "!A";', "no flip-flop"),
        (_LIBERTY % "", "has no function"),
        (_LIBERTY[:60], "ends early"),
        ("hello", "not a Liberty file"),
    ],
)
def test_unusable_libraries(text: str, word: str, environment: dict[str, str], tmp_path: Path) -> None:
    library = tmp_path / "cells[1].lib"
    library.write_text(text)
    arguments = ["engine", "synthesise", "--rows", "1", "--columns", "1", "-l", str(library)]
    assert_one_error(run(environment, *arguments), 2, word)


def test_a_nest_is_written_transformed_and_an_illegal_step_explained(
    environment: dict[str, str], tmp_path: Path
) -> None:
    from bitwright.engine.notation import parse_nest, print_nest
    from bitwright.engine.tensor_engine import TensorEngine

    path = tmp_path / "nest.txt"
    assert (
        run(environment, "engine", "generate", "--nest", "--rows", "4", "--columns", "4", "-o", str(path)).stderr == ""
    )
    done = run(environment, "engine", "transform", str(path), "-t", "retime_add p", "-t", "retime_add acc")
    wanted = print_nest(TensorEngine(4, 4, ("retime_add p", "retime_add acc")).nest)
    assert parse_nest(done.stdout) == parse_nest(wanted)
    piped = run(environment, "engine", "transform", "-", "-t", "opt1", "--json", input=path.read_text())
    assert parse_nest(json.loads(piped.stdout)["nest"]) == TensorEngine(4, 4, ("opt1",)).nest
    done = run(environment, "engine", "transform", str(path), "-t", "roll bw", "-t", "hoist_shift")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: Rule 2")
    assert parse_nest(done.stderr[done.stderr.index("nest ") :]).loop("bw").spatial is False
    deep = ["engine", "transform", str(path), "-t", "opt2", "--sum-length"]
    assert parse_nest(run(environment, *deep, "131068").stdout).words["acc_s"].bits == 26
    assert_one_error(run(environment, *deep, "200000"), 2, "acc_s", "26", "131071")
    path.write_text(path.read_text().replace("encode", "encoed"))
    assert_one_error(run(environment, "engine", "transform", str(path)), 2, "encoed", "encode", "Line")


def test_engine_outputs(environment: dict[str, str], tmp_path: Path) -> None:
    small = ["--rows", "2", "--columns", "2", "-t", "opt4c"]
    pe = run(environment, "engine", "generate", *small, "--part", "pe").stdout
    assert "module pe" in pe
    assert "endmodule" in pe
    assert "module tensor_engine" not in pe
    done = run(environment, "engine", "generate", *small, "--testbench", str(tmp_path / "bench"), "--json")
    written = json.loads(done.stdout)["written"]
    assert sorted(written) == sorted(str(path) for path in (tmp_path / "bench").iterdir())
    assert {"design.v", "testbench.v", "test_tensor_engine.py"} <= {Path(path).name for path in written}
    vcd = tmp_path / "waves.vcd"
    done = run(environment, "engine", "verify", *small, "--vectors", "20", "--simulator", "amaranth", "--vcd", str(vcd))
    assert "equal in every cycle" in done.stdout
    assert "$enddefinitions" in vcd.read_text()


def test_cycles_of_the_command_are_those_of_the_model(environment: dict[str, str]) -> None:
    from bitwright.engine.tensor_engine import TensorEngine, cycles

    done = run(environment, "engine", "cycles", "40", "30", "20", "-d", "cube", "--columns", "8", "--json")
    data = json.loads(done.stdout)
    assert data["cycles"] == cycles(TensorEngine(4, 8, dataflow="cube", depth=4), 40, 30, 20)
    assert data["evidence"] == "simulated"
    serial = run(environment, "engine", "cycles", "40", "30", "20", "-t", "opt3", "--sigma", "20", "--json")
    assert json.loads(serial.stdout)["evidence"] == "predicted"


def test_missing_tool(environment: dict[str, str], tmp_path: Path) -> None:
    environment["BITWRIGHT_YOSYS"] = str(tmp_path / "nosuch-yosys")
    assert_one_error(run(environment, "engine", "generate", "--rows", "1", "--columns", "1"), 1, "nosuch-yosys")
    path = study_file(tmp_path)
    done = run(environment, "evaluate", str(path), "-o", str(tmp_path / "out"))
    assert_one_error(done, 1, "nosuch-yosys")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(environment: dict[str, str], tmp_path: Path) -> None:
    path = study_file(tmp_path)
    assert_one_error(run(environment, "evaluate", str(path), "-o", str(path)), 2, "is a file")
    assert_one_error(run(environment, "trace", "gpt2", "-o", str(tmp_path)), 1, "Is a directory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_full_disk_behind_standard_output(environment: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*_MAIN, "systems", "--json"], env=environment, stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: The disk is full")
    assert done.stderr.count("\n") == 1


def test_closed_pipe_is_silent(environment: dict[str, str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*_MAIN, "systems", "--json"], env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "gpt2", "--machine", "a100-40g"],
        ["machine", "list"],
        ["machine", "show", "a100-40g"],
        ["systems"],
        ["cache", "show"],
        ["engine", "verify", "--rows", "1", "--columns", "1", "--vectors", "30", "--simulator", "amaranth"],
        ["engine", "generate", "--nest", "-t", "opt1"],
        ["engine", "cycles", "64", "64", "64", "-t", "opt4c", "--sigma", "20"],
    ],
)
def test_json_is_all_of_standard_output(arguments: list[str], environment: dict[str, str]) -> None:
    done = run(environment, *arguments, "--json")
    assert done.returncode == 0, done.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(done.stdout, parse_constant=refuse)


def _processes_with(marker: bytes) -> list[str]:
    """Command lines of the processes whose environment holds `marker`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_during_synthesis(number: signal.Signals, environment: dict[str, str], tmp_path: Path) -> None:
    """One line, exit code 1, no process, no temporary folder, no half-written entry; and the work can be resumed."""
    arguments = [*_MAIN, "engine", "synthesise", "--rows", "8", "--columns", "8"]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    temporary = tmp_path / "temporary"
    deadline = time.monotonic() + 60
    while not list(temporary.glob("bitwright-yosys-*/bitwright_log.txt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.startswith("error: Interrupted.")
    assert err.count("\n") == 1
    assert list(temporary.iterdir()) == []
    assert not list((tmp_path / "cache").rglob(".*"))
    marker = f"TMPDIR={temporary}".encode()
    deadline = time.monotonic() + 20  # a killed process takes a moment to give back its memory
    while (left := _processes_with(marker)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
