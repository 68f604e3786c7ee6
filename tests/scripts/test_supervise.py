"""The supervisor restarts a command after an accident, and after nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "supervise.py"

# Adds a line with its arguments to the file "starts", and ends as the N-th word of the first argument says.
COMMAND = """
import os, signal, sys
with open("starts", "a") as file:
    file.write(" ".join(sys.argv[2:]) + "\\n")
ending = sys.argv[1].split()[len(open("starts").readlines()) - 1]
os.kill(os.getpid(), signal.SIGKILL) if ending == "kill" else sys.exit(int(ending))
"""


def supervise(folder, *arguments, expect):
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == expect, done.stderr
    return done.stderr


def starts(folder):
    return (folder / "starts").read_text().splitlines()


@pytest.mark.parametrize(
    ("endings", "number", "code"),
    [
        ("0", 1, 0),
        ("2 0", 1, 2),
        ("1 0", 2, 0),
        ("kill 3 0", 3, 0),
        ("1 1 2", 3, 2),
        ("1 1 5 0", 3, 5),
        ("1 1 kill", 3, 1),
    ],
)
def test_a_command_is_restarted_after_accidents_only(tmp_path, endings, number, code):
    told = supervise(tmp_path, "--max-restarts", "2", "--", sys.executable, "-c", COMMAND, endings, expect=code)
    assert len(starts(tmp_path)) == number
    if "kill" in endings:
        assert "ended with SIGKILL" in told


def test_other_endings_may_be_final(tmp_path):
    supervise(tmp_path, "--final", "3", "--", sys.executable, "-c", COMMAND, "1 3 0", expect=3)
    assert len(starts(tmp_path)) == 2


def test_each_restart_may_use_half_the_ranks(tmp_path):
    command = (sys.executable, "-c", COMMAND, "1 1 1 0", "--ranks={ranks}")
    supervise(tmp_path, "--ranks", "4", "--min-ranks", "2", "--", *command, expect=0)
    assert starts(tmp_path) == ["--ranks=4", "--ranks=2", "--ranks=2", "--ranks=2"]


def test_processes_left_behind_are_ended_before_the_next_start(tmp_path):
    """Such processes are the ranks of a launcher that died; one that ignores SIGTERM is killed."""
    command = """
import fcntl, os, signal, subprocess, sys, time
lock = open("lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(2)  # the other one still runs
if os.path.exists("begun"):
    sys.exit(0)
open("begun", "w")
if os.fork() == 0:  # holds the lock as long as it lives
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
sys.exit(1)
"""
    supervise(tmp_path, "--grace", "1", "--", sys.executable, "-c", command, expect=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_ends_it(tmp_path, number):
    """The exit code is that of the command, which is not restarted."""
    command = """
import signal, sys, time
for each in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(each, lambda number, frame: sys.exit(3))
open("starts", "a").write("start\\n")
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, SCRIPT, "--", sys.executable, "-c", command], cwd=tmp_path)
    while not (tmp_path / "starts").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == 3
    assert starts(tmp_path) == ["start"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "got no command"),
        (("--ranks", "2", "--", "true"), "needs {ranks} in the command"),
        (("--", "echo", "{ranks}"), "needs {ranks} in the command"),
        (("--ranks", "2", "--min-ranks", "3", "--", "echo", "{ranks}"), "--min-ranks: got 3, expected 1 to 2"),
        (("--max-restarts", "-1", "--", "true"), "--max-restarts: got '-1', expected an integer of at least 0"),
        (("--", "/no/such/command"), "cannot start /no/such/command: No such file"),
    ],
)
def test_user_errors_are_reported(tmp_path, arguments, reason):
    assert reason in supervise(tmp_path, *arguments, expect=2)
