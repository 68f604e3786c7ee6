"""Atomic writing: a file appears complete or not at all.

Everything is written to a temporary name in the destination folder, flushed to the disk, and renamed. A process killed
at any moment leaves the old file, the new one, or a stray `.tmp-*`, never half a file under the final name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

TEMPORARY_PREFIX = ".tmp-"
_FLUSHED_EVERY_S = 0.1

_REASONS = {
    errno.ENOSPC: "no space is left on the device; free some, or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or choose a folder on another disk",
    errno.EFBIG: "the file would exceed the size allowed here (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "the operation is not permitted; choose a folder that you may write to",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",  # from mkdir
    errno.EISDIR: "it is a folder",
    errno.EIO: "the device reports an input/output error",
}


class WriteError(OSError):
    """A file or folder that cannot be written, for a reason that a user can remove; the message says what to do."""

    exit_code = 2

    def __str__(self) -> str:
        return f"cannot write {self.filename}: {self.strerror}"


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert errors of the operating system that a user can cause or fix into a WriteError naming `path`."""
    try:
        yield
    except WriteError:
        raise  # it names a file inside
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None:
            raise
        raise WriteError(error.errno, reason, os.fspath(path)) from error


@contextmanager
def write_errors_as(kind: type[Exception]) -> Iterator[None]:
    """Convert a WriteError into a user error of class `kind` with the same message. Also a decorator."""
    try:
        yield
    except WriteError as error:
        raise kind(str(error)) from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # below /proc, for example
        raise WriteError(error.errno, "no folder can be made there; choose another", os.fspath(path)) from error


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield an open binary file that becomes `path` when the block ends, and is deleted if the block raises.

    Missing parent folders are made. Raises WriteError if the disk is full or read-only, or access is denied.
    """
    path = Path(path)
    with writing(path):
        _make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=f"-{path.name}", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb", buffering=1 << 20) as file:
                with _flushing(descriptor):
                    yield file
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~current_umask())
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_dir(path.parent)


def save_array(file: IO[bytes], array: NDArray[Any]) -> None:
    """Write an array as np.save does, through the file's own `write`.

    np.save writes to the descriptor itself, and reports a full disk as an error without a number, which nobody can
    tell from a fault of the program.
    """
    np.save(_OnlyWrites(file), np.ascontiguousarray(array))


class _OnlyWrites:
    """A file that offers nothing but `write`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write


@contextmanager
def _flushing(descriptor: int) -> Iterator[None]:
    """Flush to disk during writing, so that little remains to be flushed at the end."""
    ended = threading.Event()
    errors: list[OSError] = []

    def flush() -> None:
        try:
            while not ended.wait(_FLUSHED_EVERY_S):
                os.fsync(descriptor)
        except OSError as error:
            errors.append(error)  # the system reports an error only once

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends, with all files flushed, replacing an existing folder.

    If the block raises, the new folder is deleted and the old one stays. Raises WriteError as `atomic_file` does.
    """
    path = Path(path)
    with writing(path):
        _make_folder(path.parent)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, suffix=f"-{path.name}", dir=path.parent))
        try:
            yield temporary
            follow_umask(temporary)
            fsync_tree(temporary)
            if path.exists():
                retired = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
                os.replace(path, retired)  # a rename cannot replace a folder that is not empty
                os.replace(temporary, path)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_dir(path.parent)


def fsync_tree(path: str | os.PathLike[str]) -> None:
    """Flush every file and folder below a folder to the disk."""
    for folder, _, files in os.walk(path):
        for name in files:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_dir(folder)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` as the whole of `path`, atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    r"""Write `text` as UTF-8, atomically, with line ends unchanged.

    Lone surrogates, which Python uses for file names that are not UTF-8, are written as \udcff, which JSON reads back.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder (renames, deletions) survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's contents, in hex, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def follow_umask(folder: str | os.PathLike[str]) -> None:
    """Give a folder and everything below it the permissions that they would have without a temporary name.

    `mkdtemp`, and libraries that write to a temporary file first, such as safetensors, restrict them to the owner.
    """
    mask = current_umask()
    for place, _, files in os.walk(folder):
        os.chmod(place, os.stat(place).st_mode & 0o7000 | 0o777 & ~mask)  # keeps inherited bits such as setgid
        for name in files:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                executable = os.stat(path).st_mode & 0o111
                os.chmod(path, (0o777 if executable else 0o666) & ~mask)


def current_umask() -> int:
    """Return the process's umask."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)  # the only other way to read it; briefly affects all threads
    os.umask(mask)
    return mask
