"""Requests to stop a run, by a signal or the end of its launcher, and the errors that end a run early."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from stlm.errors import StlmError
from stlm.training.distributed.launcher import Launcher

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class NonFinite(StlmError):
    """A loss or gradient is infinite or not a number; the last checkpoint is untouched."""

    exit_code = 1


class LostRank(StlmError):
    """Another rank has ended, and training cannot continue without it."""

    exit_code = 1


class StopRequest:
    """Record of a request to stop this process, by a signal or by the end of its launcher. The trainer reads it
    between two steps.

    A handler runs between any two instructions, so it only records the signal. Launchers may pass a signal on twice,
    and to the ranks one after another: a repeated signal changes nothing, and the ranks agree on the step to stop at.
    Python allows handlers in the main thread only, so they are installed there; `restore` brings the old ones back.

    The handler calls `noted`, in the main thread, after each signal: work that may be abandoned raises there.
    """

    def __init__(self) -> None:
        self.noted: Callable[[], None] | None = None
        self._waking = False
        self._signal: str | None = None
        self._launcher = Launcher()
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # set by nohup: the run outlives its terminal
                self._previous[number] = signal.signal(number, self._note)

    def reason(self) -> str | None:
        """Return the name of the signal, or "the end of its launcher"; None if the process was not asked to stop."""
        if self._signal is None and self._launcher.is_gone():
            return "the end of its launcher"
        return self._signal

    def wake(self) -> None:
        """Make the main thread call `noted` without a record. Called from another thread."""
        if self._previous:
            self._waking = True
            _thread.interrupt_main(signal.SIGUSR1)

    def restore(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._waking and number == signal.SIGUSR1:
            self._waking = False
        else:
            self._signal = signal.Signals(number).name
        if self.noted is not None:
            self.noted()
