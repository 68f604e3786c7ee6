"""Where text comes from: files, folders, data sets of the Hugging Face hub, and the default corpus.

Every source divides itself into units: pieces of work of bounded size, always the same for the same input, that any
process can read. The documents of all units in a row are the documents of the corpus.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline import corpus
from data_pipeline.errors import DataError
from data_pipeline.hub import HubDataset
from data_pipeline.textfiles import JSONL_SUFFIXES, SLICE, FileSlice, Problems, Reading, clean, read_slice, slices_of

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")

_FORMATS = (
    f"plain text ({', '.join(TEXT_SUFFIXES)}, or a file named by itself) and JSON Lines ({', '.join(JSONL_SUFFIXES)})"
)
_OTHER_FORMATS = frozenset(
    f".{suffix}"
    for suffix in re.findall(
        r"\w+", "parquet arrow csv tsv json html htm xml pdf doc docx epub gz xz zst bz2 zip tar tgz"
    )
)
_HUB_ID = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?$")


class Unit(Protocol):
    """A piece of work."""

    @property
    def source(self) -> int:
        """Which source it belongs to."""
        ...

    @property
    def size(self) -> int:
        """Bytes of its input, about."""
        ...

    def read(self, problems: Problems) -> Iterator[bytes]:
        """Its documents as clean UTF-8."""
        ...


class Source(Protocol):
    """One input."""

    name: str
    kind: str
    problems: Problems  # met while looking for what there is to read

    def describe(self) -> dict[str, Any]:
        """What identifies the input, found out quickly: when this differs, data prepared from it is out of date."""
        ...

    def units(self, source: int) -> Sequence[Unit]: ...


def open_sources(inputs: Sequence[str], text_key: str, on_error: str, hub_split: str) -> list[Source]:
    """The sources that the user named; the default corpus if there are none. DataError if one is nothing readable."""
    if not inputs:
        return [DefaultCorpus()]
    found = [_find(name, hub_split, text_key, on_error) for name in inputs]
    text_bytes = sum(source.text_bytes for source in found if isinstance(source, Files))
    reading = Reading(text_bytes, text_key, on_error)
    for source in found:
        if isinstance(source, Files):
            source.reading = reading
    return list(found)


def _find(name: str, hub_split: str, text_key: str, on_error: str) -> Files | HubDataset:
    path = Path(name)
    if path.is_dir():
        return Files(name, *_files_below(path), on_error)
    if path.exists():
        if path.suffix.lower() in _OTHER_FORMATS:
            raise DataError(f"cannot read {name}: {path.suffix} files are not supported; the formats are {_FORMATS}")
        return Files(name, [path], 0, on_error)
    looks_like_a_file = path.suffix.lower() in (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *_OTHER_FORMATS)
    if looks_like_a_file or not _HUB_ID.match(name):
        raise DataError(
            f"input {name!r} does not exist: expected a file, a folder, or the id of a Hugging Face data set"
        )
    return HubDataset(name, hub_split, text_key)


def _files_below(folder: Path) -> tuple[list[Path], int]:
    """The readable files below a folder in the order of their names, and how many others there are.

    Hidden ones do not count.
    """
    found: list[Path] = []
    others: set[str] = set()
    skipped = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower() in (*TEXT_SUFFIXES, *JSONL_SUFFIXES):
                found.append(path)
            elif not name.startswith("."):
                others.add(path.suffix or name)
                skipped += 1
    if not found:
        what = f"only {', '.join(sorted(others)[:8])}" if others else "no files"
        raise DataError(f"nothing to read in the folder {folder}: it holds {what}; the formats are {_FORMATS}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix()), skipped


class Files:
    """A file, or all text files of a folder."""

    kind = "files"
    reading: Reading

    def __init__(self, name: str, paths: list[Path], others: int, on_error: str) -> None:
        self.name = name
        self.problems = Problems()
        self.problems.count("files_of_other_formats", others)
        self._files: list[tuple[str, int, int]] = []
        for path in paths:
            try:
                status = path.stat()
            except OSError as error:
                message = f"cannot read {path}: {error.strerror or error}"
                if on_error != "skip":
                    raise DataError(f"{message}; leave such files out with --on-error skip") from error
                self.problems.count("unreadable_files", 1, message)
                continue
            self._files.append((str(path), status.st_size, status.st_mtime_ns))
        self.text_bytes = sum(size for path, size, _ in self._files if not path.lower().endswith(JSONL_SUFFIXES))

    def describe(self) -> dict[str, Any]:
        state = hashlib.sha256(repr(self._files).encode("utf-8", "surrogateescape")).hexdigest()
        size = sum(size for _, size, _ in self._files)
        return {"kind": self.kind, "path": str(Path(self.name).resolve()), "bytes": size, "state": state}

    def units(self, source: int) -> Sequence[Unit]:
        units: list[Unit] = []
        slices: list[FileSlice] = []
        total = 0
        for path, size, _ in self._files:
            for piece in slices_of(path, size):
                if slices and total + piece.stop - piece.start > SLICE:
                    units.append(FilesUnit(source, total, tuple(slices), self.reading))
                    slices, total = [], 0
                slices.append(piece)
                total += piece.stop - piece.start
        if slices:
            units.append(FilesUnit(source, total, tuple(slices), self.reading))
        return units


@dataclass(frozen=True)
class FilesUnit:
    """Slices of files, 64 MiB together at most."""

    source: int
    size: int
    slices: tuple[FileSlice, ...]
    reading: Reading

    def read(self, problems: Problems) -> Iterator[bytes]:
        for piece in self.slices:
            yield from read_slice(piece, self.reading, problems)


class DefaultCorpus:
    """English prose from the installed packages: see `corpus`."""

    name = "default corpus"
    kind = "default corpus"
    problems = Problems()

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "version": corpus.CORPUS_VERSION, "packages": corpus.installed_versions()}

    def units(self, source: int) -> Sequence[Unit]:
        return [CorpusUnit(source, size, package, files) for package, files, size in corpus.corpus_units()]


@dataclass(frozen=True)
class CorpusUnit:
    """Some files of an installed package."""

    source: int
    size: int
    package: str
    files: tuple[str, ...]

    def read(self, problems: Problems) -> Iterator[bytes]:
        for document in corpus.read_unit(self.package, self.files):
            yield clean(document, problems)
