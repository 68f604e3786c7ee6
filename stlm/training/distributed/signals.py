"""Requests to stop a run: signals, and the end of the launcher.

The `deepspeed` command ends at once on SIGTERM, but its second process, launch.py, the parent of the ranks, lives on
with them. torchrun and mpirun pass SIGTERM on, but leave their ranks behind when killed by SIGKILL. So a rank stores
which of its ancestor processes belong to the launcher, and checks from time to time that they are still its ancestors.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

# Launchers, by the name of the program, the Python script, or the module.
_COMMANDS = {"deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "orted"}
_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
_NODE_LAUNCHER = "deepspeed.launcher.launch"  # one on each node, started by `deepspeed` itself or by ssh
_INIT = 1  # becomes the parent of orphaned processes


class StopSignals:
    """Record of a request to stop this process, by a signal or by the end of its launcher, from `listen` to `restore`.
    The trainer reads it between two steps.

    A handler runs between any two instructions, so it only records the signal. Launchers may pass a signal on twice,
    and to the ranks one after another: a repeated signal changes nothing, and the ranks agree on the step to stop at.
    Python allows handlers in the main thread only, so `listen` installs them there alone.

    The handler calls `noted`, in the main thread, after each signal: work that may be abandoned raises there.
    """

    def __init__(self) -> None:
        self.noted: Callable[[], None] | None = None
        self._waking = False
        self._signal: str | None = None
        self._launcher = Launcher()
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the signal handlers, and forget earlier signals."""
        self.restore()
        self._signal = None
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


class Launcher:
    """The launcher of this process, found at construction; construct it early."""

    def __init__(self) -> None:
        above: list[int] = []
        names: set[str] = set()
        pid = os.getppid()
        while names_here := _launchers_in(pid):
            above.append(pid)
            names = names_here
            pid = _parent_of(pid)
        if _NODE_LAUNCHER in names:  # its parent is part of the launcher too
            above.append(pid)
        self._above = above
        self._gone = _NODE_LAUNCHER in names and pid == _INIT  # already

    def is_gone(self) -> bool:
        """Return True if a process of the launcher has ended, so that this process should too. Takes microseconds."""
        if self._above and not self._gone:
            pids = [os.getppid()]
            pids += [_parent_of(pid) for pid in self._above[:-1]]
            self._gone = pids != self._above
        return self._gone


def _launchers_in(pid: int) -> set[str]:
    """Return the names of launchers in the command line of a process; empty where it is none, or has ended."""
    words = _read(pid, "cmdline").split("\0")
    return {os.path.basename(word) for word in words[:2]} & _COMMANDS | set(words[:5]) & _MODULES


def _parent_of(pid: int) -> int:
    """Return the parent of a process; 0 if there is no such process."""
    after_name = _read(pid, "stat").rpartition(")")[2].split()  # state, parent, …
    return int(after_name[1]) if after_name else 0


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
