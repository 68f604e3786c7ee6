"""Run a command, and restart it after a failure."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from types import FrameType

DONE, FAILED, USER_ERROR = 0, 1, 2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LONGEST_WAIT_S = 60.0


def supervise(
    command: Sequence[str], log: Callable[[str], None], *, max_restarts: int, ranks: int = 1, min_ranks: int = 1,
    grace_s: float = 30.0, final: Collection[int] = (),
) -> int:  # fmt: skip
    """Run `command` until it is done, and return the exit code of its last run; 1 if a signal ended it.

    Exit codes 0, 2 and those in `final` end it, as does a signal to this process, which is forwarded. `{ranks}` in the
    command stands for `ranks`, halved at each restart down to `min_ranks`. `grace_s`: seconds that processes left
    running by the command have to end before they are killed.
    """
    supervised = Supervised(log, grace_s)
    restarts = 0
    while True:
        words = [word.replace("{ranks}", str(ranks)) for word in command]
        log(f"start {restarts + 1} of at most {max_restarts + 1}: {shlex.join(words)}")
        code = supervised.run(words)
        if code in {DONE, USER_ERROR, *final} or supervised.signalled():
            return code if code >= 0 else FAILED
        if restarts == max_restarts:
            log(f"ended with {_name(code)}; no restart is left")
            return code if code > 0 else FAILED
        restarts += 1
        ranks = max(min_ranks, ranks // 2)  # a batch divisible by the ranks is divisible by half of them
        wait = min(LONGEST_WAIT_S, 2.0 ** (restarts - 1))
        log(f"ended with {_name(code)}; restarting in {wait:.0f} s")
        supervised.sleep(wait)
        if supervised.signalled():
            return code if code > 0 else FAILED


class Supervised:
    """A command in its own process group, to which signals to this process are forwarded."""

    def __init__(self, log: Callable[[str], None], grace_s: float) -> None:
        self._log = log
        self._grace_s = grace_s
        self._signal: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._forward)

    def signalled(self) -> bool:
        """Return whether this process has received a signal."""
        return self._signal is not None

    def run(self, words: list[str]) -> int:
        """Run the command, end the processes it leaves, and return its exit code; negative if a signal ended it."""
        try:
            self._process = subprocess.Popen(words, start_new_session=True)
        except OSError as error:
            self._log(f"cannot start {words[0]}: {error.strerror}")
            return USER_ERROR
        code = self._process.wait()
        self._end_group(self._process.pid)
        self._process = None
        return code

    def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or a signal comes."""
        until = time.monotonic() + seconds
        while self._signal is None and time.monotonic() < until:
            time.sleep(min(0.2, seconds))

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._process is not None:
            _signal_group(self._process.pid, number)

    def _end_group(self, group: int) -> None:
        """Terminate the remaining processes of a process group, and kill them after the grace period."""
        if not _signal_group(group, signal.SIGTERM):
            return
        self._log("ending the processes that the command left running")
        until = time.monotonic() + self._grace_s
        while time.monotonic() < until:
            time.sleep(0.2)
            if not _signal_group(group, 0):
                return
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; return False if it has no process left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
