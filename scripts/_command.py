"""Code shared by all scripts: they run without installation, and user errors print one line and set an exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # import this file first, so that `import stlm` finds the code next to scripts/


for _name, _mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, _name) is None:  # the parent process closed it
        setattr(sys, _name, open(os.devnull, _mode))  # noqa: SIM115 (as long as the process)

if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # file names that are not UTF-8; ASCII terminals

# Errors that users can fix. A missing file is not among them: code that expects it raises an error of its own.
_THEIRS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
    | {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
)


def _outside_of_run(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Report an uncaught exception as Python does, except Ctrl-C during a script's imports."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(3)


sys.excepthook = _outside_of_run


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
        code = _tell(error)
        if code is None:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush again at exit
        if code == 0 and not isinstance(error, BrokenPipeError):
            code = _tell(error)
    sys.exit(code)


def _tell(error: Exception) -> int | None:
    """Print a user error and return its exit code; return None for any other error."""
    if hasattr(error, "exit_code"):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in _THEIRS:
        place = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {place}{error.strerror}", file=sys.stderr)
        return 2
    return None
