"""What can go wrong in the middle of a run, and how all ranks learn of it."""

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
    """A loss or gradient became infinite or not a number; the last checkpoint is untouched."""

    exit_code = 1


class LostRank(StlmError):
    """Another rank has ended, and training cannot go on without it."""

    exit_code = 1


class StopRequest:
    """Notes that this process was asked to stop: by a signal, or by the end of its launcher. The trainer acts on it
    between two steps.

    A handler runs anywhere between two instructions, so it only notes. Launchers pass a signal on a second time and to
    the ranks one after another: a repeated signal changes nothing, and the ranks agree on the step to stop at by
    themselves. Handlers are installed in the main thread only, where Python allows it; `restore` brings the old ones.

    `noted` is called by the handler, in the main thread, after each note: work that may be given up raises there.
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
                    continue  # nohup wants it so: the run outlives its terminal
                self._previous[number] = signal.signal(number, self._note)

    def reason(self) -> str | None:
        """What asked this process to stop; None if nothing did."""
        if self._signal is None and self._launcher.is_gone():
            return "the end of its launcher"
        return self._signal

    def wake(self) -> None:
        """From another thread, let the main thread call `noted` without a note."""
        if self._previous:
            self._waking = True
            _thread.interrupt_main(signal.SIGUSR1)

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
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
