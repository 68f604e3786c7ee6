"""Many files as one input: below a folder, matching a pattern, or named one by one.

Links to folders are followed, and each folder is read once, so cyclic links end. Hidden files and folders (`.name`),
folders of prepared data (they hold manifest.json), and their reports (report.html) are never input.

Many files named one by one, such as by an unquoted shell pattern, are one source, because every source has its own
units, entries in the manifest, and lines in the report. A few files, named by hand, stay separate sources.
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.sources.formats import READABLE, format_of, format_of_named
from data_pipeline.sources.indexed import indexed_prefix
from data_pipeline.sources.problems import Problems
from data_pipeline.storage.manifest import MANIFEST_FILE, WORK_DIR

_REPORT_FILE = "report.html"
_MANY = 16  # consecutive files named one by one; more are one source


def files_below(folder: Path, on_error: str, problems: Problems) -> list[Path]:
    """Return the readable files below a folder in the order of their names; add those left out to `problems`.

    Raises DataError if there are none, for a folder of prepared data, and, unless `on_error` is "skip", for a folder
    that cannot be read.
    """
    if _is_prepared(folder):
        name = MANIFEST_FILE if (folder / MANIFEST_FILE).exists() else WORK_DIR
        raise DataError(
            f"{folder} holds {name}, so it is prepared data, not input: name the text that it was made from; to read "
            f"text files in it all the same, name them by a pattern, '{folder}/*.txt'"
        )
    found, here = [], Problems()
    for path in _entries(folder, on_error, here, lambda parts: True):
        if os.path.isdir(path):
            continue
        if path.name == _REPORT_FILE:
            here.leave_out("reports", str(path))
        elif format_of(path):
            found.append(path)
        else:
            here.leave_out("files_of_other_formats", str(path))
    if not found and "unreadable_folders" not in here.left_out:
        names = here.left_out.get("files_of_other_formats", ())
        kinds = sorted({Path(name).suffix or Path(name).name for name in names})
        others = [reason.replace("_", " ") for reason in here.left_out if reason != "files_of_other_formats"]
        what = f"only {', '.join([*kinds[:8], *others])}" if kinds or others else "no files"
        raise DataError(f"nothing to read in the folder {folder}: it holds {what}; the formats are {READABLE}")
    problems.add(here)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def matches_of(pattern: str, on_error: str, problems: Problems) -> list[Path]:
    """Return the files and folders that match a pattern, in the order of their names. Raises DataError as
    `files_below`.
    """
    root, parts = Path(pattern), list[str]()
    while glob.has_magic(str(root)):
        root, parts = root.parent, [root.name, *parts]
    found = []
    for path in _entries(root, on_error, problems, lambda below: _leads(below, parts)) if os.path.isdir(root) else ():
        if _fits(path.relative_to(root).parts, parts):
            if path.name == _REPORT_FILE:
                problems.leave_out("reports", str(path))
            else:
                found.append(path)
    return sorted(found, key=str)


def _entries(root: Path, on_error: str, problems: Problems, enter: Callable[[Sequence[str]], bool]) -> Iterator[Path]:
    """Yield files and folders below a folder, descending into those that `enter` accepts by the parts of their relative
    path.
    """
    read: set[tuple[int, int]] = set()  # folders read, by device and inode
    waiting, links = [root], list[Path]()  # contents of the folder itself precede targets of links
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            status = folder.stat()
            if not os.access(folder, os.R_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            message = f"cannot read the folder {folder}: {error.strerror or error}"
            if on_error != "skip":
                raise DataError(f"{message}; leave such folders out with --on-error skip") from None
            problems.leave_out("unreadable_folders", message)
            continue
        if (status.st_dev, status.st_ino) in read:
            problems.leave_out("linked_folders", str(folder))
            continue
        read.add((status.st_dev, status.st_ino))
        if folder != root and _is_prepared(folder):
            problems.leave_out("prepared_folders", str(folder))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                problems.leave_out("hidden_files", str(path))
                continue
            yield path
            if os.path.isdir(path) and enter(path.relative_to(root).parts):
                (links if entry.is_symlink() else waiting).append(path)


def _is_prepared(folder: Path) -> bool:
    """Return whether a folder holds prepared data, or a preparation in progress."""
    return os.path.exists(folder / MANIFEST_FILE) or os.path.isdir(folder / WORK_DIR)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a pattern matches a path, both given by their parts; ** stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _fits(parts, pattern[1:]):
        return True
    if not parts:
        return False
    return fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern if pattern[0] == "**" else pattern[1:])


def _leads(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether something below a folder may match."""
    if not parts or not pattern:
        return bool(pattern)
    return pattern[0] == "**" or (fnmatchcase(parts[0], pattern[0]) and _leads(parts[1:], pattern[1:]))


class Group(str):
    """Text files as one input; as a string, its name."""

    paths: tuple[str, ...]

    def __new__(cls, paths: Sequence[str]) -> Group:
        beginning = os.path.commonprefix(list(paths))  # noqa: RUF071 - of characters
        ending = os.path.commonprefix([path[len(beginning) :][::-1] for path in paths])[::-1]  # noqa: RUF071
        others = number_of(len(paths) - 1, "other file")
        name = f"{beginning}*{ending}" if beginning or ending else f"{paths[0]} and {others}"
        group = super().__new__(cls, name)
        group.paths = tuple(sorted(paths))  # in the order of a pattern, regardless of the shell's locale
        return group


def grouped(names: Sequence[str]) -> tuple[str, ...]:
    """Return the inputs with every run of more than 16 text files replaced by a Group."""
    return tuple(itertools.chain.from_iterable(_groups(names)))


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for is_file, run in itertools.groupby(names, _is_text_file):
        files = list(run)
        yield [Group(files)] if is_file and len(files) > _MANY else files


def _is_text_file(name: str) -> bool:
    path = Path(name)
    return os.path.isfile(name) and format_of_named(path) is not None and indexed_prefix(path) is None
