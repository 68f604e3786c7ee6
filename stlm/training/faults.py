"""What can go wrong in the middle of a run, and how all ranks learn of it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from stlm.errors import StlmError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class NonFinite(StlmError):
    """A loss or gradient became infinite or not a number; the last checkpoint is untouched."""

    exit_code = 1


class StopRequest:
    """Notes that a signal asked this process to stop; the trainer acts on it between two steps.

    A handler runs anywhere between two instructions, so it only notes. Launchers pass a signal on a second time and to
    the ranks one after another: a repeated signal changes nothing, and the ranks agree on the step to stop at by
    themselves. Handlers are installed in the main thread only, where Python allows it; `restore` brings the old ones.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
