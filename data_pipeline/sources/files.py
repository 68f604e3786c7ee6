"""Text files as a source: one file, those that match a pattern, or all below a folder."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.sources.encodings import NotText, check_text, sample_of
from data_pipeline.sources.formats import READABLE, format_of_named
from data_pipeline.sources.json_files import json_texts
from data_pipeline.sources.plain_text import AUTO, LINES, Rule, count_within_lines, divided
from data_pipeline.sources.records import page_text, parquet_texts, table_texts
from data_pipeline.sources.text_files import (
    BOM,
    SLICE,
    FileSlice,
    Problems,
    Reading,
    clean,
    lines,
    opened,
    records,
    slices_of,
)


class Files:
    """Some files, in a fixed order."""

    kind = "files"
    rule = Rule(AUTO)  # divides plain text into documents
    reading: Callable[[], Reading]  # determined when the units are requested

    def __init__(self, name: str, paths: Sequence[Path], on_error: str, problems: Problems | None = None) -> None:
        """problems: met during the search for the files. Raises DataError for a file of an unsupported format."""
        self.name = name
        self.problems = problems or Problems()
        self._files: list[tuple[str, int, int]] = []
        self.text: list[tuple[str, int]] = []  # plain-text files that are not empty, and their sizes
        self.kinds: set[str] = set()  # of formats
        for path in paths:
            found = format_of_named(path)
            if found is None:
                raise DataError(f"cannot read {path}: its format is not supported; the formats are {READABLE}")
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise OSError("it is not a file; to read the output of another program, use --input -")
                if not os.access(path, os.R_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            except OSError as error:
                message = f"cannot read {path}: {error.strerror or error}"
                if on_error != "skip":
                    raise DataError(f"{message}; leave such files out with --on-error skip") from error
                self.problems.leave_out("unreadable_files", message)
                continue
            self._files.append((str(path), status.st_size, status.st_mtime_ns))
            self.kinds.add(found.kind)
            if not status.st_size:
                self.problems.leave_out("empty_files", str(path))
            if found.kind == "text" and status.st_size:
                self.text.append((str(path), status.st_size))

    def describe(self) -> dict[str, Any]:
        size = sum(size for _, size, _ in self._files)
        described = {"kind": self.kind, "path": str(Path(self.name).resolve()), "bytes": size}
        return described | {"number": len(self._files), "state": state_of(self._files)} | self._documents

    def contents(self) -> list[tuple[str, int]]:
        """Return the files and their sizes; their bytes identify the input."""
        return [(path, size) for path, size, _ in self._files]

    def kind_of(self, path: str) -> str:
        """Return how a file is read, as a word: files with the same word and bytes hold the same text."""
        found = format_of_named(path)
        return f"{found.kind}{found.compression}" if found else ""

    @property
    def _documents(self) -> dict[str, Any]:
        """The rule that divides plain text, if there is any."""
        return {"documents": str(self.rule)} if "text" in self.kinds else {}

    @property
    def number_of_files(self) -> int:
        """The number of files that are not empty."""
        return sum(size > 0 for _, size, _ in self._files)

    def units(self, source: int) -> Sequence[FilesUnit]:
        reading = self.reading()
        units: list[FilesUnit] = []
        slices: list[FileSlice] = []
        total = 0
        for path, size, _ in self._files:
            for piece in slices_of(path, size, reading.division, reading.encoding):
                if slices and total + piece.stop - piece.start > SLICE:
                    units.append(FilesUnit(source, total, tuple(slices), reading))
                    slices, total = [], 0
                slices.append(piece)
                total += piece.stop - piece.start
        if slices:
            units.append(FilesUnit(source, total, tuple(slices), reading))
        return units


def state_of(files: Sequence[tuple[str, int, int]]) -> str:
    """Return a hash of paths, sizes and times. Files are assumed unchanged while it is the same."""
    absolute = [(os.path.abspath(path), size, time) for path, size, time in files]
    return hashlib.sha256(repr(absolute).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class FilesUnit:
    """Slices of files, 64 MiB together at most, unless one indivisible file is longer."""

    source: int
    size: int
    slices: tuple[FileSlice, ...]
    reading: Reading

    def read(self, problems: Problems) -> Iterator[bytes]:
        for piece in self.slices:
            for document in read_slice(piece, self.reading, problems):
                if isinstance(document, bytes) and self.reading.conversations:
                    yield document
                else:
                    yield clean(document, problems)


def read_slice(piece: FileSlice, reading: Reading, problems: Problems) -> Iterator[bytes | str]:
    """Yield the documents that begin in a slice, as they are in the file (`clean` comes later).

    Raises DataError for a file that is unreadable, cut short, damaged, in UTF-16, without the text column or shorter
    than it was, and for a broken line or row. If on_error is "skip" these are counted instead; documents read before
    them are kept.
    """
    try:
        yield from _read_slice(piece, reading, problems)
        if _size(piece.path, piece.size) < piece.size:
            raise DataError(f"cannot read {piece.path}: it became shorter while it was read")
    except DataError as error:
        if reading.on_error != "skip":
            raise
        if isinstance(error, NotText) and piece.start:
            return  # the first slice of the file has reported it
        problems.leave_out("unreadable_files", str(error))


def _size(path: str, otherwise: int) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # removed after it was opened and read
        return otherwise


def _read_slice(piece: FileSlice, reading: Reading, problems: Problems) -> Iterator[bytes | str]:
    with opened(piece) as file:
        if piece.format.kind == "parquet":
            yield from parquet_texts(file, piece, reading)
            return
        if piece.format.kind == "html":
            yield from page_text(file, piece, reading, problems)
            return
        sample = sample_of(file, None if piece.limit == math.inf else piece.size)
        if not reading.encoding:
            check_text(sample, piece.path)
        first = len(BOM) if sample[0].startswith(BOM) else 0
        if piece.start == 0:
            problems.count("byte_order_marks", int(first > 0))
        file.seek(first)
        match piece.format.kind:
            case "csv":
                yield from table_texts(file, piece, reading, problems)
            case "jsonl":
                yield from lines(file, piece, first, reading, problems)
            case "json":
                yield from json_texts(file, piece, first, reading, problems)
            case _ if reading.division.rule.kind == LINES:
                for _, line in records(file, piece, first, reading, problems):
                    problems.division["lines"] += 1
                    yield line.strip(b"\r\n")
            case _:
                span = piece.start, piece.limit
                counts = problems.division
                for document in divided(file, piece.path, span, first, piece.size, reading.division, counts):
                    count_within_lines(document, piece.path, reading.division, counts)
                    yield document
