"""The standard input as a source: kept in a file first, and known by what it holds.

A pipe can be read once. Its bytes go to a file beside the prepared data, whose name is their hash; from then on it is a
text file like any other. So the same text sent again goes on where a killed preparation was, and other text is noticed.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from data_pipeline.atomic import atomic_file
from data_pipeline.errors import DataError
from data_pipeline.files import Files
from data_pipeline.formats import READABLE, format_of

STDIN = "-"
_BLOCK = 1 << 20
_PREFIX = ".stdin-"


class Stdin(Files):
    """The standard input, read to its end when this is made, or found to be read already by this process."""

    kind = "stdin"

    def __init__(self, suffix: str, spool: Path) -> None:
        """suffix: that of a file with such contents. spool: folder of the file that keeps it."""
        path, self._sha256 = _kept(suffix, spool)
        super().__init__("the standard input", [path], on_error="stop")
        self._suffix = suffix

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "format": self._suffix, "sha256": self._sha256}


def check_stdin_format(suffix: str) -> None:
    """DataError if no format is known by this suffix."""
    if format_of(f"stdin.{suffix}") is None:
        raise DataError(f"the format {suffix!r} of the standard input is unknown; the formats are {READABLE}")


@functools.lru_cache(maxsize=1)
def _kept(suffix: str, spool: Path) -> tuple[Path, str]:
    """The file, which is removed when this process ends, and the sha256 of its contents."""
    digest = hashlib.sha256()
    with atomic_file(spool / f"{_PREFIX}{os.getpid()}") as file:
        while block := sys.stdin.buffer.read(_BLOCK):
            digest.update(block)
            file.write(block)
    path = spool / f"{_PREFIX}{digest.hexdigest()}.{suffix}"
    os.replace(spool / f"{_PREFIX}{os.getpid()}", path)
    os.utime(path, ns=(0, 0))  # its name says what it holds: when that came says nothing
    lock = path.open("rb")  # open as long as this process lives
    fcntl.flock(lock, fcntl.LOCK_SH)
    atexit.register(_remove, path, lock)
    return path, digest.hexdigest()


def _remove(path: Path, lock: IO[bytes]) -> None:
    with suppress(BlockingIOError):  # another process reads the same text
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
