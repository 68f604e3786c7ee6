"""Detection of hanging ranks: a rank was stopped, its node vanished, or ranks wait for each other.

A rank that dies closes its connections, and the others notice at once. A rank that hangs does not, and torch would let
the others wait for half an hour or longer. So each rank has a thread that measures how long the current collective work
takes, and ends the process when that exceeds a limit. It first writes the stacks of all threads to a folder that all
ranks see; when that folder appears, the other ranks write their stacks too. Work of rank 0 alone, such as writing to a
slow disk, has no limit: meanwhile it sends heartbeats, which renew the time of the waiting ranks.
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
from typing import Concatenate, ParamSpec, TypeVar

from torch.distributed import Store

S = TypeVar("S")
P = ParamSpec("P")
T = TypeVar("T")

EXIT_CODE = 1
BEATS = "beats"  # key of the store: rank 0's heartbeats while it works alone


class Watchdog:
    """Watchdog of this process from `start` to `stop`. Outside of that, its methods cost next to nothing."""

    def __init__(self) -> None:
        self.tick_s = 60.0  # between two checks
        self._since: float | None = None  # when the watched work began
        self._what = ""
        self._busy = False
        self._stopped: threading.Event | None = None

    def start(self, folder: Path, rank: int, timeout_s: float, store: Store) -> None:
        """Start watching: no watched work may take longer than `timeout_s`.

        `folder`: for the stacks, seen by all ranks, and not yet present. `store`: a separate connection to the store
        that all ranks share.
        """
        self.stop()
        self.tick_s = min(timeout_s / 4, 5.0)
        self._stopped = threading.Event()
        arguments = (folder, rank, timeout_s, store, self._stopped)
        threading.Thread(target=self._watch, args=arguments, name="stlm-watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop watching. Safe to call twice."""
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Watch the work inside this context, which all ranks do together. Nested work has its own time."""
        outer = self._what if self._since is not None else None
        self._what, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._what, self._since = (outer, time.monotonic()) if outer is not None else ("", None)

    def renew(self) -> None:
        """Restart the time of the watched work, which makes progress."""
        if self._since is not None:
            self._since = time.monotonic()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Allow this rank to work alone inside this context without a limit; the others wait for it."""
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
                reason = f"{what} made no progress for {timeout_s:g} s (training.hang_timeout_s)"
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
            time.sleep(2 * self.tick_s)  # lets the others see the folder and write theirs
            os._exit(EXIT_CODE)


def complain(text: str) -> None:
    """Write an error line to stderr, since the process ends without raising an exception."""
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


def write_stacks(path: Path, reason: str) -> None:
    """Write the stacks of all threads of this process to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()} on {socket.gethostname()}: {reason}\n\n"
        )
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def watched(what: str) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Return a decorator that watches a method, or a function by its first argument, which all ranks call together.

    The object, or the first argument, has the attribute `distributed`. `what` names the work in messages.
    """

    def decorate(function: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(function)
        def inside(owner: S, *args: P.args, **kwargs: P.kwargs) -> T:
            with owner.distributed.watchdog.watching(what):  # type: ignore[attr-defined]
                return function(owner, *args, **kwargs)

        return inside

    return decorate
