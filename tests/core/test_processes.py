import contextlib
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.core.processes import default_processes, each

SLEEPERS = """
import sys, time
from bitwright.core.processes import each
from bitwright.core.progress import set_quiet
if __name__ == "__main__":
    try:
        for index, _ in each(time.sleep, [(0.01,)] + [(300,)] * 5, 2):
            print("done", index, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_is_done_once(processes):
    found = dict(each(math.gcd, [(12, 18), (7, 21), (5, 9)], processes))
    assert found == {0: 6, 1: 7, 2: 1}


def test_exceptions_of_jobs_are_raised_and_nothing_stays():
    with pytest.raises(ValueError, match=r"sqrt|math domain|nonnegative"):
        list(each(math.sqrt, [(-1.0,), (4.0,)], 2))


def test_a_worker_that_dies_is_named():
    with pytest.raises(BitwrightError, match="fewer processes"):
        list(each(os._exit, [(3,), (3,)], 2))


def test_leaving_early_ends_the_workers():
    for index, _ in each(time.sleep, [(0.01,), (300,), (300,)], 2):
        assert index == 0
        break


def session_ends(pid):
    """Whether nobody of a session is left, workers included."""
    for _ in range(100):
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_an_interrupt_ends_running_and_waiting_jobs(tmp_path):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "done 0\n"
    process.send_signal(signal.SIGINT)
    try:
        rest, _ = process.communicate(timeout=60)  # the jobs would sleep for minutes
        assert session_ends(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert rest == "interrupted\n"


def test_processes_by_default():
    assert default_processes(1) == 1
    assert 1 <= default_processes(1000) <= (os.cpu_count() or 1)
