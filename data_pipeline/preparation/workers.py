"""Teams that share independent work: processes of this machine here, those of several machines in `mpi`.

Work is a function and jobs, the arguments of independent calls of it. Functions must be importable, and jobs and
results small: large data stays in files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.progress import Progress

Result = TypeVar("Result")

_WITH_THREADS = {
    "datasets",
    "mpi4py",
    "pyarrow",
    "rensa",
    "tokenizers",
    "torch",
}  # libraries that start threads
_WORTH_A_PROCESS = 16 << 20  # bytes of input; starting one takes half a second


class Team(Protocol):
    """A group of processes that shares work."""

    def run(
        self, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], size: int
    ) -> Iterator[tuple[int, Result]]:
        """Yield the number of each job and the result of `function(*job)`, as jobs finish, in any order.

        size: bytes of the input of all jobs, from which a team may choose how many processes to use. An error in a job
        is raised here, and no further job is started.
        """
        ...

    def check_shared(self, path: Path) -> None:
        """Raise DataError if a member of the team does not see this file."""
        ...


class Workers:
    """Processes on this machine that share work. With one process, or one job, all work runs in the calling process.

    The processes start with the first work, and end with the `with` block.
    """

    def __init__(self, number: int | None = None) -> None:
        """number: of processes; None: as many as pay off, one per core at most."""
        self.number = number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], size: int
    ) -> Iterator[tuple[int, Result]]:
        if processes_for(self.number, size) <= 1 or len(jobs) <= 1:
            for index, job in enumerate(jobs):
                yield index, function(*job)
            return
        self._pool = self._pool or process_pool(self.number or available_cores())
        futures: dict[Future[Result], int] = {}
        try:
            for index, job in enumerate(jobs):
                futures[submit(self._pool, function, job)] = index
            for future in as_completed(futures):
                yield futures[future], result_of(future)
        finally:
            for future in futures:
                future.cancel()

    def check_shared(self, path: Path) -> None:
        """Do nothing: processes of one machine see the same files."""


def run_all(
    what: str, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], sizes: Sequence[int], team: Team
) -> list[Result]:
    """Return the results of all jobs, in their order, with a progress bar labelled `what` that counts input bytes."""
    results: dict[int, Result] = {}
    with Progress(total=sum(sizes), unit="B", unit_scale=True, desc=what, delay=1, leave=False) as bar:
        for index, result in team.run(function, jobs, sum(sizes)):
            results[index] = result
            bar.update(sizes[index])
    return [results[index] for index in range(len(jobs))]


def call(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function(*arguments)` as a job, so that jobs of several kinds can be run together."""
    return function(*arguments)


def processes_for(number: int | None, size: int) -> int:
    """Return the number of processes for this many bytes of work: `number` if given, else as many as pay off."""
    return number or min(available_cores(), 1 + size // _WORTH_A_PROCESS)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(number: int) -> ProcessPoolExecutor:
    """Return a pool of processes that end with this one, however it ends."""
    context = multiprocessing.get_context("fork" if _may_fork() else "spawn")
    return ProcessPoolExecutor(number, mp_context=context, initializer=_follow_the_parent)


def _may_fork() -> bool:
    """Return whether processes may be forked, which keeps the imported modules and saves half a second.

    A copy of a process with threads may hang. Python's threads are counted; libraries that start threads are listed.
    """
    threads = threading.active_count() > 1 or not _WITH_THREADS.isdisjoint(sys.modules)
    return sys.platform == "linux" and not threads


def submit(pool: ProcessPoolExecutor, function: Callable[..., Result], job: tuple[Any, ...]) -> Future[Result]:
    """Start a job. Raises DataError if one of the processes was killed."""
    # A process started here inherits the blocked signals, so Ctrl-C while it starts reaches the parent alone.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, *job)
    except BrokenProcessPool as error:
        raise _killed() from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def result_of(future: Future[Result]) -> Result:
    """Return the result of a job. Raises DataError if one of the processes was killed."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _killed() from error


def _killed() -> DataError:
    return DataError(
        "a worker process was killed, perhaps because memory ran out; repeat the command with fewer --workers to resume"
    )


def _follow_the_parent() -> None:
    """Ignore interrupts, which the parent handles, and exit when the parent does, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
