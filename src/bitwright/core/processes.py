"""Independent jobs in local processes, ended at once when the user interrupts."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any

from bitwright.core.errors import BitwrightError

_ENDED = 143  # exit status of a worker that was told to end


def default_processes(jobs: int) -> int:
    """One process per core this process may use, at most one per job."""
    return max(1, min(len(os.sched_getaffinity(0)), jobs))


def each(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], processes: int,
    prepare: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """(index, `function(*jobs[index])`) as the jobs finish, in `processes` processes; in this one if it is 1.

    `prepare` runs first in every worker. An exception of a job ends the iteration; then, and when the iteration is
    left early or interrupted, the workers and the programs they started are ended at once. Raises BitwrightError when
    a worker dies.
    """
    if processes == 1:
        yield from ((index, function(*job)) for index, job in enumerate(jobs))
        return
    others = set(active_children())
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, (prepare,))
    waiting = {pool.submit(_call, function, job): index for index, job in enumerate(jobs)}
    try:
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool:
        raise BitwrightError(
            "A worker process ended unexpectedly, perhaps for lack of memory; use fewer processes and run it again."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(active_children()) - others:
            worker.terminate()


def _start_worker(prepare: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED))
    if prepare is not None:
        prepare()


def _call(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    try:
        return function(*job)
    except SystemExit:  # the job has ended the programs it started; no other job shall begin
        os._exit(_ENDED)
