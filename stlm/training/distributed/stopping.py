"""Interruption of long work between steps: a validation, or the tasks of the section `evals`.

A signal handler only sets a flag (signals.py), which the trainer reads between two steps, as steps are short. A
validation or an evaluation can last longer than a cluster waits before it kills a job, so all ranks abandon it.

A validation contains collectives, so the ranks exchange their flags from time to time, before the same forward pass
(`AgreedStop`). Tasks have only one sum at the end of each, and every rank scores its own items. There the flag becomes
an exception, wherever the rank is. A thread informs the other ranks, and all agree by an additional sum, which precedes
the next sum of the work or follows its last one (`Interruptible`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch.distributed import Store

from stlm.training.distributed.signals import StopSignals

T = TypeVar("T")
Sum = Callable[[Sequence[float]], list[float]]  # each value summed over all ranks

POLL_S = 0.25  # between two checks of the flags of this rank and of the others
AGREE_S = 0.5  # between two agreements of the ranks


class Interrupted(BaseException):
    """Raised inside work that is abandoned because a rank was asked to stop. No `Exception`, so work cannot catch it
    as an error."""


def never() -> bool:
    """Return False: work that nothing interrupts."""
    return False


class AgreedStop:
    """Callable that returns True once a rank was asked to stop, the same on all ranks. All ranks call it equally often.

    The ranks exchange a sum at most every `AGREE_S` seconds or so, however often it is called. The number of calls
    without a sum is computed from times that all ranks know.
    """

    def __init__(self, signals: StopSignals, rank: int, sum_over_ranks: Sum) -> None:
        self._signals = signals
        self._rank = rank
        self._sum_over_ranks = sum_over_ranks
        self._skipped, self._skip = 0, 0
        self._since = time.monotonic()

    def __call__(self) -> bool:
        if self._skipped < self._skip:
            self._skipped += 1
            return False
        now = time.monotonic()
        taken = now - self._since if self._rank == 0 else 0.0
        asked, taken = self._sum_over_ranks([float(self._signals.reason() is not None), taken])
        self._skip = min(int(AGREE_S * (self._skip + 1) / max(taken, 1e-9)), 2 * self._skip + 1)
        self._skipped, self._since = 0, now
        return asked > 0


class Interruptible:
    """Runner of work that is abandoned when a rank is asked to stop. Every rank calls `run` with the same work.

    `open_store` opens another connection to the ranks' store, for use in a thread; it returns None for a single rank.
    """

    def __init__(self, signals: StopSignals, sum_over_ranks: Sum, open_store: Callable[[], Store | None]) -> None:
        self._signals = signals
        self._sum_over_ranks = sum_over_ranks
        self._open_store = open_store
        self._running = False
        self._runs = 0  # the same on all ranks
        self._armed = False  # whether Interrupted may be raised at any point now
        self._agreed = False  # whether all ranks know that the work is abandoned
        self._told = False  # whether another rank was asked to stop

    def run(self, work: Callable[[], T]) -> T | None:
        """Return the value of `work`; None, on all ranks, where it was abandoned or not begun.

        The work may be interrupted once it has read all of `first(…)`.
        """
        self._runs, self._told = self._runs + 1, False
        if self._agree(self._asked()):
            return None
        done, value, stopped = threading.Event(), None, False
        gradients = torch.is_grad_enabled()
        watcher = threading.Thread(target=self._watch, args=(done,), name="stlm-stopping", daemon=True)
        self._running, self._signals.noted = True, self._interrupt
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
            self._running, self._signals.noted = False, None
            done.set()
            watcher.join()
        if self._agreed:
            return None
        return None if self._agree(stopped) else value

    def first(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, which the ranks make together. After the last one, the work may be interrupted."""
        yield from items
        self._arm()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks, or raise Interrupted on all of them where one has abandoned the work."""
        if not self._running:
            return self._sum_over_ranks(values)
        self._armed = False
        if self._agree(self._asked()):
            self._agreed = True
            raise Interrupted
        total = self._sum_over_ranks(values)
        self._arm()
        return total

    def _agree(self, stopped: bool) -> bool:
        """Return True if a rank abandons the work. Each rank calls this at the same sums, or once to abandon it."""
        self._agreed = False
        return self._sum_over_ranks([float(stopped)])[0] > 0

    def _asked(self) -> bool:
        return self._told or self._signals.reason() is not None

    def _arm(self) -> None:
        self._armed = True
        if self._asked():
            self._interrupt()

    def _interrupt(self) -> None:
        """Raise Interrupted in the main thread after a signal, but only once, so that clean-up is not interrupted."""
        if self._armed:
            self._armed = False
            raise Interrupted

    def _watch(self, done: threading.Event) -> None:
        """Post this rank's request to stop for the other ranks, and read theirs, until `done`."""
        while not done.wait(POLL_S):
            here = self._signals.reason() is not None
            try:
                if self._store is not None:
                    key = f"stop/{self._runs}"
                    if here:
                        self._store.set(key, "1")
                    self._told = self._told or self._store.check([key])
            except RuntimeError:  # rank 0, which hosts the store, is gone; the next sum raises an error
                return
            if (here or self._told) and self._armed:
                self._signals.wake()

    @cached_property
    def _store(self) -> Store | None:
        return self._open_store()
