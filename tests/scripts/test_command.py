"""Exceptions of commands: one line and an exit code for a user's error, a traceback for a fault."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from stlm.commands.program import COMMANDS, run
from stlm.errors import ConfigError, Stopped

ROOT = Path(__file__).parents[2]


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
def test_each_exception_has_its_exit_code_and_output(capsys, outcome, code, message):
    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as ending:
        run(main)
    assert ending.value.code == code
    assert capsys.readouterr().err == message


def test_a_fault_keeps_its_traceback():
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
def test_output_that_cannot_be_written_sets_the_exit_code(redirection, outcome, code, message):
    script = f"import sys; from _command import run; run(lambda: print('a') or {outcome})"
    command = ["bash", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, script]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(command, cwd=ROOT / "scripts", env=environment, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (code, message)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_program_lists_its_commands(arguments):
    printed = stlm(*arguments).stdout.splitlines()
    listed = {line.split()[0] for line in printed if line.startswith("  ")}
    modules = {path.stem for path in (ROOT / "stlm" / "commands").glob("[!_]*.py")} - {"program", "options"}
    scripts = {path.stem for path in (ROOT / "scripts").glob("[!_]*.py")}
    assert listed == set(COMMANDS) == modules == scripts


def test_the_program_starts_a_command(tmp_path):
    """The usage names the command, and the option that DeepSpeed's launcher puts first is accepted."""
    for launcher in ([], ["--local_rank=0"]):
        result = stlm(*launcher, "pretrain", "--config", "qickstart", expect=2)
        assert result.stdout == "" and "quickstart" in result.stderr and "Traceback" not in result.stderr
    assert stlm("supervise", "--help").stdout.startswith("usage: stlm supervise ")


def test_a_misspelt_command_is_answered_with_the_nearest():
    for name, nearest in (("evaluat", "evaluate"), ("convert-checkpoint", "convert_checkpoint"), ("x", "")):
        result = stlm(name, expect=2)
        assert result.stdout == "" and f"error: stlm: got {name!r}" in result.stderr and f"'{nearest}" in result.stderr


def test_help_imports_no_torch():
    script = """import contextlib, importlib, sys
sys.modules["torch"] = None
from stlm.commands.program import COMMANDS
for name in COMMANDS:
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"stlm.commands.{name}").main(["--help"])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.count("usage: ")) == (0, len(COMMANDS)), result.stderr


def stlm(*arguments, expect=0):
    result = subprocess.run([sys.executable, "-m", "stlm", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == expect, result.stderr
    return result
