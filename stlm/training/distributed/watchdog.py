"""Notices that the ranks hang: one of them was stopped, its node is gone without a word, or they wait for each other.

A rank that dies closes its connections, and the others learn of it at once. One that only stands still does not, and
torch would have them wait for half an hour or longer. So each rank has a thread that knows since when the rank is in a
piece of work which all of them do together, and ends the process when that has taken too long: first it writes
the stacks of all threads into a folder that all ranks see, which is also how the others learn that they should write
theirs. What rank 0 does alone, such as writing to a slow disk, may take as long as it takes: while it is at it, it
beats, and those who wait for it hear that.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from torch.distributed import Store

P = ParamSpec("P")
T = TypeVar("T")

EXIT_CODE = 1
BEATS = "stlm/beats"  # key of the store: rank 0's heartbeats while it works alone


class Watchdog:
    """Watches this process from `start` to `stop`; before and after, what it is told costs nothing."""

    def __init__(self) -> None:
        self.tick_s = 60.0  # between two looks
        self._since: float | None = None  # when the work began that is watched now
        self._what = ""
        self._busy = False
        self._stopped: threading.Event | None = None

    def start(self, folder: Path, rank: int, timeout_s: float, store: Store) -> None:
        """From now on no watched work may take longer than `timeout_s`. `folder`: for the stacks, seen by all ranks and
        made by nobody yet. `store`: a connection of its own to what all ranks see."""
        self.stop()
        self.tick_s = min(timeout_s / 4, 5.0)
        self._stopped = threading.Event()
        arguments = (folder, rank, timeout_s, store, self._stopped)
        threading.Thread(target=self._watch, args=arguments, name="stlm-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer. A second call does nothing."""
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Inside is work that all ranks do together. Work within work is watched by itself."""
        outer = self._what if self._since is not None else None
        self._what, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._what, self._since = (outer, time.monotonic()) if outer is not None else ("", None)

    def renew(self) -> None:
        """The watched work goes on: its time begins anew."""
        if self._since is not None:
            self._since = time.monotonic()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside is work of this rank alone, for which the others wait as long as it takes."""
        outer, self._since, self._busy = self._since, None, True
        try:
            yield
        finally:
            self._busy, self._since = False, None if outer is None else time.monotonic()

    def _watch(self, folder: Path, rank: int, timeout_s: float, store: Store, stopped: threading.Event) -> None:
        while not stopped.wait(self.tick_s):
            if self._busy:
                store.add(BEATS, 1)
            since, what = self._since, self._what
            if since is not None and time.monotonic() - since > timeout_s:
                reason = f"{what} has not gone on for {timeout_s:g} s (training.hang_timeout_s)"
            elif folder.exists():
                reason = "another rank hangs"
            else:
                continue
            file = folder / f"rank_{rank}.txt"
            complain(f"rank {rank} on {socket.gethostname()}: {reason}; stacks in {file}")
            try:
                write_stacks(file, reason)
            except OSError as error:
                complain(f"{file}: {error.strerror}")
            time.sleep(2 * self.tick_s)  # until the others have seen the folder, and written theirs
            os._exit(EXIT_CODE)


def complain(text: str) -> None:
    """A line where errors go; this process has no other way to say it."""
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


def write_stacks(path: Path, reason: str) -> None:
    """What all threads of this process are doing, into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()} on {socket.gethostname()}: {reason}\n\n"
        )
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


WATCHDOG = Watchdog()  # of this process


def watched(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of functions that all ranks call together."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            with WATCHDOG.watching(what):
                return function(*args, **kwargs)

        return inside

    return decorate
