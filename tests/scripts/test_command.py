"""What becomes of exceptions: one line and an exit code for a user's mistake, a traceback for a fault."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from stlm.errors import ConfigError, Stopped

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from _command import run

    return run


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (None, 0, ""),
        (4, 4, ""),
        (ConfigError("what, where"), 2, "error: what, where\n"),
        (DataError("what, where"), 2, "error: what, where\n"),
        (Stopped("saved at step 3"), 3, "error: saved at step 3\n"),
        (KeyboardInterrupt(), 3, "interrupted\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "error: a/b: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_outcome(run, capsys, outcome, code, message):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as ending:
        run(main)
    assert ending.value.code == code
    assert capsys.readouterr().err == message


def test_a_fault_keeps_its_traceback(run):
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):
        run(lambda: open("no such file").close())


def test_ctrl_c_before_there_is_anything_to_run():
    script = "import _command; raise KeyboardInterrupt"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (3, "", "interrupted\n")


@pytest.mark.parametrize(
    ("redirection", "outcome", "code", "message"),
    [
        ("> /dev/full", "0", 2, "error: No space left on device\n"),
        ("> /dev/full", "3", 3, ""),
        (">&-", "0", 0, ""),
        ("<&- >&-", "sys.stdin.isatty() or 3", 3, ""),
    ],
)
def test_where_nothing_can_be_printed(redirection, outcome, code, message):
    script = f"import sys; from _command import run; run(lambda: print('a') or {outcome})"
    command = ["bash", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, script]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(command, cwd=ROOT / "scripts", env=environment, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (code, message)
