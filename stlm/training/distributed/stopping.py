"""How a run stops in the middle of long work that is not a step: a validation, or the tasks of the section `evals`.

A signal handler only makes a note (faults.py). Between two steps the trainer reads it; a step is short. A validation
or an evaluation can last longer than a cluster waits before it kills a job, so it is given up, on all ranks alike.

A validation has collectives in it, so the ranks ask each other now and then, at the same forward (`AgreedStop`). Tasks
have none but the sums at the end of each, and every rank scores items of its own. There the note is turned into an
exception, wherever the rank is; a thread passes it on to the other ranks, and they find out by a sum that either takes
the place of the sum to come or follows the last one (`Interruptible`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch

from stlm.training.distributed.collectives import notice_board, sum_over_ranks
from stlm.training.distributed.stop_request import StopRequest

T = TypeVar("T")

ASKED = "stlm/stop"  # key of the notice board
POLL_S = 0.25  # between two looks at the notes of this rank and of the others
AGREE_S = 0.5  # between two agreements of the ranks


class Interrupted(BaseException):
    """Raised inside work that is given up, because a rank was asked to stop. Not an error that the work may handle."""


def never() -> bool:
    """Nothing asks to stop."""
    return False


class AgreedStop:
    """Whether a rank was asked to stop, the same answer on all of them: each rank calls it equally often.

    The ranks exchange a sum every `AGREE_S` seconds at most, however short the work between two calls is; how many
    calls go without is decided from times that all ranks know.
    """

    def __init__(self, request: StopRequest, rank: int) -> None:
        self._request = request
        self._rank = rank
        self._skipped, self._skip = 0, 0
        self._since = time.monotonic()

    def __call__(self) -> bool:
        if self._skipped < self._skip:
            self._skipped += 1
            return False
        now = time.monotonic()
        taken = now - self._since if self._rank == 0 else 0.0
        asked, taken = sum_over_ranks([float(self._request.reason() is not None), taken])
        self._skip = min(int(AGREE_S * (self._skip + 1) / max(taken, 1e-9)), 2 * self._skip + 1)
        self._skipped, self._since = 0, now
        return asked > 0


class Interruptible:
    """Runs work that is given up when a rank is asked to stop. Every rank calls `run`, with the same work."""

    _running: Interruptible | None = None  # of this process

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._armed = False  # whether an exception may be raised where this rank is now
        self._agreed = False  # whether all ranks know that the work is given up
        self._told = False  # whether another rank was asked

    def run(self, work: Callable[[], T]) -> T | None:
        """The value of `work`; None, on all ranks, where it was given up or not begun.

        It may be interrupted from the moment when it has read all of `first(…)`.
        """
        if self._agree(self._asked()):
            return None
        done, value, stopped = threading.Event(), None, False
        gradients = torch.is_grad_enabled()
        watcher = threading.Thread(target=self._watch, args=(done,), name="stlm-stopping", daemon=True)
        Interruptible._running, self._request.noted = self, self._interrupt
        watcher.start()
        try:
            try:
                value = work()
            finally:
                self._armed = False
        except Interrupted:
            stopped = True
            torch.set_grad_enabled(gradients)  # its own clean-up may have been interrupted
        finally:
            Interruptible._running, self._request.noted = None, None
            done.set()
            watcher.join()
        if self._agreed:
            return None
        return None if self._agree(stopped) else value

    def first(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, which the ranks make together; behind them, the work may be interrupted."""
        yield from items
        self._arm()

    @classmethod
    def sum(cls, values: Sequence[float]) -> list[float]:
        """`sum_over_ranks`, or Interrupted on all ranks where one has given up the work that is running."""
        running = cls._running
        if running is None:
            return sum_over_ranks(values)
        running._armed = False
        if running._agree(running._asked()):
            running._agreed = True
            raise Interrupted
        total = sum_over_ranks(values)
        running._arm()
        return total

    def _agree(self, stopped: bool) -> bool:
        """Whether a rank gives up. Each rank calls this at the same sums, or once, when it gives up."""
        self._agreed = False
        return sum_over_ranks([float(stopped)])[0] > 0

    def _asked(self) -> bool:
        return self._told or self._request.reason() is not None

    def _arm(self) -> None:
        self._armed = True
        if self._asked():
            self._interrupt()

    def _interrupt(self) -> None:
        """In the main thread, where a signal came: give up, but once, so that the way out is not interrupted."""
        if self._armed:
            self._armed = False
            raise Interrupted

    def _watch(self, done: threading.Event) -> None:
        """Tell the other ranks what this one was asked, and hear of theirs."""
        while not done.wait(POLL_S):
            here = self._request.reason() is not None
            try:
                if here and self._board is not None:
                    self._board.set(ASKED, "1")
                self._told = self._told or (self._board is not None and self._board.check([ASKED]))
            except RuntimeError:  # rank 0, which keeps the board, is gone: the next sum says so
                return
            if (here or self._told) and self._armed:
                self._request.wake()

    @cached_property
    def _board(self) -> Any:
        return notice_board()
