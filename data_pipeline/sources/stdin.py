"""The standard input, or a pipe opened by the shell such as `<(head -c 1000 text)`, as a source, stored in a file
first.

A pipe can be read once. Its bytes are written to a file next to the prepared data, named by their hash; it is then read
like any text file. So the same text sent again resumes a killed preparation, and other text is recognised as such.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import DataError
from data_pipeline.sources.files import Files
from data_pipeline.sources.formats import READABLE, format_of
from data_pipeline.storage.atomic import atomic_file, write_errors_as

STDIN = "-"
_BLOCK = 1 << 20
_PREFIX = ".stdin-"


class Stdin(Files):
    """A pipe, read to its end on construction unless this process has read it already."""

    kind = "stdin"

    def __init__(self, suffix: str, spool: Path, name: str = STDIN) -> None:
        """suffix: of a file with such contents. spool: folder for the stored text. name: of the pipe."""
        path, self._sha256 = _kept(name, suffix, spool)
        super().__init__("the standard input" if name == STDIN else name, [path], on_error="stop")
        self._suffix = suffix

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "format": self._suffix, "sha256": self._sha256} | self._documents


def check_stdin_format(suffix: str) -> None:
    """Raise DataError if no format has this suffix."""
    if format_of(f"stdin.{suffix}") is None:
        raise DataError(f"the format {suffix!r} of the standard input is unknown; the formats are {READABLE}")


def is_pipe(path: Path) -> bool:
    """Return whether a path is a pipe that this process was started with. Other pipes may wait for a writer forever."""
    return path.parts[:3] in (("/", "dev", "fd"), ("/", "proc", "self")) and path.is_fifo()


@functools.cache
@write_errors_as(DataError)
def _kept(name: str, suffix: str, spool: Path) -> tuple[Path, str]:
    """Store a pipe's text; return the file, which is removed when this process ends, and the sha256 of its contents."""
    digest = hashlib.sha256()
    with _opened(name) as text, atomic_file(spool / f"{_PREFIX}{os.getpid()}") as file:
        while block := text.read(_BLOCK):
            digest.update(block)
            file.write(block)
    path = spool / f"{_PREFIX}{digest.hexdigest()}.{suffix}"
    os.replace(spool / f"{_PREFIX}{os.getpid()}", path)
    os.utime(path, ns=(0, 0))  # its name identifies the contents; the time must not matter
    lock = path.open("rb")  # open until this process ends
    fcntl.flock(lock, fcntl.LOCK_SH)
    atexit.register(_remove, path, lock)
    return path, digest.hexdigest()


def _opened(name: str) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdin.buffer) if name == STDIN else open(name, "rb")


def _remove(path: Path, lock: IO[bytes]) -> None:
    with suppress(BlockingIOError):  # another process reads the same text
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
