"""The documents of plain-text and .jsonl files, read in slices of bounded size.

A file of any size is read as slices of 64 MiB, by whoever is free. Where a slice really begins and ends depends only on
the file, so the documents of all slices in a row are the same whoever reads them, and memory does not grow with files
or lines.

Plain text: a document is what stands between blank lines, gathered until a thousandth of all the text is reached, and
at most 1 MiB. So a folder of articles gives one document per article, and a short file still gives enough documents to
hold some back for validation. Documents never cross files, and the blank lines around them are not theirs. A paragraph
longer than a sixteenth of all the text (at least 16 KiB, at most 1 MiB) is cut at a line end or a space.

JSON Lines: a document is the string under the text key of each line.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from data_pipeline.errors import DataError

SLICE = 64 << 20
JSONL_SUFFIXES = (".jsonl", ".ndjson")

_MIB = 1 << 20
_BLOCK = 4 * _MIB
_LONGEST_LINE = 64 * _MIB  # of .jsonl: a line has to fit into memory
_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_BLANK_LINES = re.compile(rb"\n(?:[ \t]*\r?\n)+")

ON_ERROR = ("stop", "skip")


@dataclass
class Problems:
    """What was wrong with the input and how it was dealt with, counted by name, with the first few places."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def count(self, name: str, number: int = 1, example: str = "") -> None:
        if number:
            self.counts[name] += number
            if example and len(self.examples) < 5:
                self.examples.append(example)


@dataclass(frozen=True)
class Reading:
    """How to read: what is the same for all files of a preparation."""

    text_bytes: int  # of all plain-text inputs together
    text_key: str
    on_error: str  # "stop" or "skip"

    @property
    def gathered(self) -> int:
        """Paragraphs are gathered into documents of about this many bytes."""
        return min(max(self.text_bytes // 1024, 1), _MIB)

    @property
    def longest(self) -> int:
        """Longer paragraphs are cut."""
        return min(max(self.text_bytes // 16, 16 << 10), _MIB)


@dataclass(frozen=True)
class FileSlice:
    """Bytes [start, stop) of a file of `size` bytes, moved to where documents begin."""

    path: str
    start: int
    stop: int
    size: int


def slices_of(path: str, size: int) -> list[FileSlice]:
    return [FileSlice(path, start, min(start + SLICE, size), size) for start in range(0, size, SLICE)]


def read_slice(piece: FileSlice, reading: Reading, problems: Problems) -> Iterator[bytes]:
    """The documents that begin in a slice, clean.

    Raises DataError for an unreadable file, UTF-16, and, unless on_error is "skip", a broken line of .jsonl.
    """
    try:
        with _reading(piece.path), open(piece.path, "rb") as file:
            beginning = file.read(3)
            if beginning[:2] in _UTF16_BOMS:
                raise DataError(f"{piece.path} is UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
            first = len(_BOM) if beginning == _BOM else 0
            if piece.start == 0:
                problems.count("byte_order_marks", int(first > 0))
            read = _lines if piece.path.lower().endswith(JSONL_SUFFIXES) else _paragraphs
            yield from read(file, piece, first, reading, problems)
    except DataError as error:
        if reading.on_error != "skip":
            raise
        problems.count("unreadable_files", 1, str(error))


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def clean(document: bytes | str, problems: Problems) -> bytes:
    """A document as valid UTF-8 with LF as line end.

    What is not valid UTF-8, or a lone surrogate in JSON, becomes U+FFFD; CRLF becomes LF; a CR alone stays. All of it
    is counted.
    """
    if isinstance(document, str):
        try:
            raw = document.encode("utf-8")
        except UnicodeEncodeError:
            lone = sum(0xD800 <= ord(character) < 0xE000 for character in document)
            problems.count("invalid_utf8_documents")
            problems.count("replaced_characters", lone)
            raw = re.sub("[\ud800-\udfff]", "\ufffd", document).encode("utf-8")
    else:
        raw = document
        if not raw.isascii():
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("utf-8", errors="replace")
                problems.count("invalid_utf8_documents")
                problems.count("replaced_characters", text.count("\ufffd") - raw.count("\ufffd".encode()))
                raw = text.encode("utf-8")
    if b"\r\n" in raw:
        problems.count("crlf_line_ends", raw.count(b"\r\n"))
        raw = raw.replace(b"\r\n", b"\n")
    return raw


def _paragraphs(file: IO[bytes], piece: FileSlice, first: int, reading: Reading, problems: Problems) -> Iterator[bytes]:
    start = _document_start(file, piece.start, first, piece.size, reading)
    stop = _document_start(file, piece.stop, first, piece.size, reading)
    file.seek(start)
    left = stop - start
    buffer = b""
    while left > 0:
        block = file.read(min(_BLOCK, left))
        if not block:
            raise DataError(f"cannot read {piece.path}: it became shorter while it was read")
        left -= len(block)
        buffer += block
        begin = end = 0  # of the document that is being gathered
        for paragraph_start, paragraph_end in _split(buffer, reading.longest, final=left == 0):
            if paragraph_end - begin > reading.gathered and end > begin:
                yield clean(buffer[begin:end].strip(b"\r\n"), problems)
                begin = paragraph_start
            end = paragraph_end
        if left == 0 and not (last := buffer[begin:end]).isspace() and last:
            yield clean(last.strip(b"\r\n"), problems)
        buffer = buffer[begin:]  # the last document may go on in the next block: it is gathered again


def _split(buffer: bytes, longest: int, final: bool) -> Iterator[tuple[int, int]]:
    """Start and end of each paragraph that is surely whole; of all of them when the buffer is the last."""
    start = 0
    for blank in _BLANK_LINES.finditer(buffer):
        if blank.end() == len(buffer) and not final:
            break  # more blank lines may follow
        for cut in _cuts(buffer, start, blank.start(), longest):
            yield start, cut
            start = cut
        yield start, blank.start()
        start = blank.end()
    for cut in _cuts(buffer, start, len(buffer), longest):
        yield start, cut
        start = cut
    if final:
        yield start, len(buffer)


def _cuts(buffer: bytes, start: int, stop: int, longest: int) -> Iterator[int]:
    """Where to cut a paragraph so that no part is longer than `longest`."""
    while stop - start > longest:
        start += _cut_length(buffer[start : start + longest])
        yield start


def _cut_length(piece: bytes) -> int:
    """Where to cut a paragraph that is longer than `piece`: after the last line end, or space, or whole character."""
    for separator in (b"\n", b" "):
        if found := piece.rfind(separator) + 1:
            return found
    length = len(piece)
    for back in range(1, min(4, length)):
        if piece[-back] & 0xC0 == 0xC0:  # the first byte of a character that may go on behind the piece
            return length - back
        if piece[-back] & 0xC0 != 0x80:
            break
    return length


def _document_start(file: IO[bytes], position: int, first: int, size: int, reading: Reading) -> int:
    """The first place at or after `position` where a document of plain text may begin."""
    if position <= first:
        return first
    if position >= size:
        return size
    file.seek(position)
    window = file.read(reading.longest)
    if blank := _BLANK_LINES.search(window):
        return position + blank.end()
    if position + len(window) == size:
        return size
    for separator in (b"\n", b" "):
        if found := window.find(separator) + 1:
            return position + found
    return position + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _lines(file: IO[bytes], piece: FileSlice, first: int, reading: Reading, problems: Problems) -> Iterator[bytes]:
    position = _line_start(file, piece.start, first)
    file.seek(position)
    while position < piece.stop and (line := file.readline(_LONGEST_LINE)):
        begin, position = position, position + len(line)
        try:
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                position = _line_start(file, position, first)
                raise ValueError(f"the line is longer than {_LONGEST_LINE >> 20} MiB")
            if text := line.strip():
                yield _document_of(text, reading.text_key, problems)
        except ValueError as error:
            message = f"{piece.path}:{_line_number(piece.path, begin)}: {error}"
            if reading.on_error != "skip":
                raise DataError(f"{message}; correct it, or leave such lines out with --on-error skip") from None
            problems.count("broken_lines", 1, message)


def _document_of(line: bytes, text_key: str, problems: Problems) -> bytes:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", errors="replace")
        problems.count("invalid_utf8_documents")
        problems.count("replaced_characters", text.count("\ufffd") - line.count("\ufffd".encode()))
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with the key {text_key!r}, got {type(record).__name__}")
    if text_key not in record:
        raise ValueError(f"no key {text_key!r} (--text-key); the keys are: {', '.join(map(str, list(record)[:10]))}")
    if not isinstance(record[text_key], str):
        raise ValueError(f"{text_key!r} is not a string but {type(record[text_key]).__name__}")
    return clean(record[text_key], problems)


def _line_start(file: IO[bytes], position: int, first: int) -> int:
    """The first line that begins at or after `position`."""
    if position <= first:
        return first
    file.seek(position - 1)
    while (line := file.readline(_BLOCK)) and not line.endswith(b"\n"):
        pass
    return file.tell()


def _line_number(path: str, position: int) -> int:
    """The number of the line that begins at `position`, counted only when it is needed for a message."""
    number = 1
    with open(path, "rb") as file:
        while position > 0 and (block := file.read(min(_BLOCK, position))):
            number += block.count(b"\n")
            position -= len(block)
    return number
