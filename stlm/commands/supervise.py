"""Keep a training command running: start it again, from its last checkpoint, when it ends in an accident.

    python scripts/supervise.py -- deepspeed scripts/pretrain.py --ds_config ds_configs/zero2.json --run runs/long
    python scripts/supervise.py --ranks 4 --min-ranks 2 -- deepspeed --num_accelerators {ranks} scripts/pretrain.py …

It is not started again when it ends with 0 (done), 2 (a mistake of the user, which it would only repeat) or what
--final names, nor when the supervisor itself is asked to stop: SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on, and
the exit code is what the command then ends with. Before each start, whatever the last one left running is ended. Name
the run with --run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

DONE, MISTAKE, FAILED = 0, 2, 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LONGEST_WAIT_S = 60.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N", help="starts after the first one, at most (default: 3)"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="what {ranks} in the command stands for at the first start"
    )
    parser.add_argument(
        "--min-ranks", type=int, metavar="N",
        help="each restart uses half the ranks, down to N of them (default: always --ranks)",
    )  # fmt: skip
    parser.add_argument(
        "--final", type=int, action="append", default=[], metavar="CODE",
        help="another exit code that is an end, such as 3 where ranks are stopped by others than the supervisor",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="S",
        help="seconds that what a command left running has to end, before it is killed (default: 30)",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command; write it behind --, for example: -- python scripts/pretrain.py --run runs/long")
    if options.max_restarts < 0:
        parser.error(f"--max-restarts: got {options.max_restarts}, expected 0 or more")
    placed = any("{ranks}" in word for word in command)
    if placed != (options.ranks is not None):
        parser.error("--ranks N and {ranks} in the command go together: deepspeed --num_accelerators {ranks} …")
    fewest = options.ranks if options.min_ranks is None else options.min_ranks
    if placed and not 1 <= fewest <= options.ranks:
        parser.error(f"--min-ranks: got {fewest}, expected 1 to {options.ranks}")
    final = {DONE, MISTAKE, *options.final}
    return supervise(command, options.max_restarts, options.ranks or 1, fewest or 1, options.grace, final)


def supervise(command: list[str], max_restarts: int, ranks: int, fewest: int, grace_s: float, final: set[int]) -> int:
    """Run the command until it is done, and return the exit code of its last run; 1 if a signal ended it."""
    asked = Supervised(grace_s)
    restarts = 0
    while True:
        words = [word.replace("{ranks}", str(ranks)) for word in command]
        say(f"start {restarts + 1} of at most {max_restarts + 1}: {shlex.join(words)}")
        code = asked.run(words)
        if code in final or asked.came():
            return code if code >= 0 else FAILED
        if restarts == max_restarts:
            say(f"ended with {describe(code)}; no restart is left")
            return code if code > 0 else FAILED
        restarts += 1
        ranks = max(fewest, ranks // 2)  # halve: a batch divisible by the ranks is divisible by half of them
        wait = min(LONGEST_WAIT_S, 2.0 ** (restarts - 1))
        say(f"ended with {describe(code)}; starting again in {wait:.0f} s")
        asked.sleep(wait)
        if asked.came():
            return code if code > 0 else FAILED


class Supervised:
    """A command run in its own process group, to which the supervisor's signals are forwarded."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._signal: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def came(self) -> bool:
        """Return whether the supervisor has received a signal."""
        return self._signal is not None

    def run(self, words: list[str]) -> int:
        """Run the command, end the processes it leaves, and return its exit code; negative if a signal ended it."""
        try:
            self._process = subprocess.Popen(words, start_new_session=True)
        except OSError as error:
            say(f"cannot start {words[0]}: {error.strerror}")
            return MISTAKE
        code = self._process.wait()
        end_group(self._process.pid, self._grace_s)
        self._process = None
        return code

    def sleep(self, seconds: float) -> None:
        """Sleep, or return early when a signal has come."""
        until = time.monotonic() + seconds
        while self._signal is None and time.monotonic() < until:
            time.sleep(min(0.2, seconds))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self._process is not None:
            signal_group(self._process.pid, number)


def end_group(group: int, grace_s: float) -> None:
    """Terminate the remaining processes of a process group, and kill them after the grace period."""
    if not signal_group(group, signal.SIGTERM):
        return
    say("ending what the command left running")
    until = time.monotonic() + grace_s
    while time.monotonic() < until:
        time.sleep(0.2)
        if not signal_group(group, 0):
            return
    signal_group(group, signal.SIGKILL)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; return False if it has no process left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def describe(code: int) -> str:
    """Return an exit code as text."""
    return f"{signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def say(text: str) -> None:
    """Print a line of the supervisor to stderr, apart from the command's output."""
    print(f"supervise: {text}", file=sys.stderr, flush=True)
