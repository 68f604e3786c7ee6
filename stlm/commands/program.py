"""Start a command, print user errors in one line, and set the exit code. `stlm NAME` and scripts/NAME.py begin here."""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

# Each command and its line in the list that `stlm` prints; its module has the same name.
COMMANDS = {
    "preprocess": "prepare text for training",
    "pretrain": "train a model",
    "evaluate": "evaluate a model",
    "generate": "generate text, or score a text",
    "describe": "show a model's cost, a run's progress, the text of a step",
    "compare": "compare models with significance tests",
    "probe": "train probes on a model's representations",
    "serve": "serve a model to many clients",
    "convert_checkpoint": "convert a model, and verify that its logits are the same",
    "make_instructions": "write questions about the default corpus, with answers",
    "supervise": "restart a command after a failure",
    "doctor": "check that this machine can train",
}
LEAVE_AT_ONCE = {"pretrain"}  # threads of the communication library can abort the process during Python's shutdown

# Errors that users can fix. A missing file is not among them: code that expects it raises an error of its own.
_THEIRS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
    | {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
)


def main() -> NoReturn:
    """Run `stlm NAME`, the program of an installed package. Without a name, list the commands."""
    launcher = [word for word in sys.argv[1:2] if word.startswith(("--local_rank", "--local-rank"))]
    name, *rest = sys.argv[1 + len(launcher) :] or ["--help"]  # deepspeed --module stlm pretrain: it puts its own first
    if name in COMMANDS:
        sys.argv = [f"stlm {name}", *launcher, *rest]
        start(name)
    run(lambda: _list() if name in ("-h", "--help") else _refuse(name))


def start(name: str) -> NoReturn:
    """Run a command on the arguments of the process, and exit."""
    try:
        run(lambda: importlib.import_module(f"stlm.commands.{name}").main())
    except SystemExit as ending:
        if name not in LEAVE_AT_ONCE:
            raise
        leave(ending.code)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with what it returns (None: 0).

    Exit codes: 0 done, 2 user error, 3 stopped by a signal, 1 anything else, which prints its traceback.
    """
    try:
        code = main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 3
    except BrokenPipeError:  # the reader (head, less) has exited
        code = 0
    except Exception as error:
        known = _print_user_error(error)
        if known is None:
            raise
        code = known
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush again at exit
        if code == 0 and not isinstance(error, BrokenPipeError):
            code = _print_user_error(error) or 1
    sys.exit(code)


def leave(code: Any) -> NoReturn:
    """Exit without Python's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _list() -> None:
    width = max(map(len, COMMANDS)) + 2
    print("usage: stlm COMMAND [OPTION …]\n")
    for name, line in COMMANDS.items():
        print(f"  {name:{width}}{line}")
    print("\nstlm COMMAND --help prints the options of a command.")


def _refuse(name: str) -> int:
    near = difflib.get_close_matches(name.replace("-", "_"), COMMANDS, n=1, cutoff=0.0)[0]
    advice = f"the nearest is {near!r}; stlm --help lists all"
    print(f"error: stlm: got {name!r}, expected a command; {advice}", file=sys.stderr)
    return 2


def _print_user_error(error: Exception) -> int | None:
    """Print a user error and return its exit code; return None for any other error."""
    if hasattr(error, "exit_code"):
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    if isinstance(error, OSError) and error.errno in _THEIRS:
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {place}{error.strerror}", file=sys.stderr)
        return 2
    return None


# The process, as every command needs it: set when this module is imported, which comes before anything slow.
def _outside_of_run(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report an uncaught exception as Python does, except Ctrl-C during imports."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(3)


sys.excepthook = _outside_of_run
for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, _name) is None:  # the parent process closed it
        setattr(sys, _name, open(os.devnull, _mode))  # noqa: SIM115 (as long as the process)
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # file names that are not UTF-8; ASCII terminals
