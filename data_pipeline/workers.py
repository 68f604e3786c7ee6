"""Who does the work: processes of this machine here, those of several machines in `ranks`.

Work is a function and jobs, the arguments of independent calls of it. Everything that is called must be importable, and
jobs and results must be small: what is large stays in files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipeline.errors import DataError

Result = TypeVar("Result")


class Team(Protocol):
    """Those who share the work."""

    def run(self, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Result]]:
        """The number of each job and what `function(*job)` gave, as they are done, in any order.

        An error in a job is raised here and no further job is begun.
        """
        ...

    def check_shared(self, path: Path) -> None:
        """DataError if a member of the team does not see this file."""
        ...


class Workers:
    """A team of processes of this machine. With one, or for one job, everything happens in the process that asks."""

    def __init__(self, number: int | None = None) -> None:
        """number: of processes; None: one per core."""
        self.number = number or available_cores()

    def run(self, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Result]]:
        if self.number <= 1 or len(jobs) <= 1:
            for index, job in enumerate(jobs):
                yield index, function(*job)
            return
        with processes(min(self.number, len(jobs))) as pool:
            futures = {pool.submit(function, *job): index for index, job in enumerate(jobs)}
            for future in as_completed(futures):
                yield futures[future], future.result()

    def check_shared(self, path: Path) -> None:
        """Processes of one machine see the same files."""


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes. When the block ends, jobs that were not begun are dropped and the others finished.

    DataError if one of the processes is killed.
    """
    # "spawn": a fork of a process that has threads, as PyArrow, PyTorch and MPI make them, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_follow_the_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise killed_worker() from error
    finally:
        pool.shutdown(cancel_futures=True)


def killed_worker() -> DataError:
    return DataError(
        "a worker process was killed, perhaps for want of memory; "
        "repeat the command to go on from here, with fewer --workers"
    )


def _follow_the_parent() -> None:
    """Leave interrupts to the parent, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
