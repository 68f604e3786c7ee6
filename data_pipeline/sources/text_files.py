"""The documents of files, read in slices of bounded size.

Plain text, JSON Lines and Parquet of any size are read as slices of 64 MiB, by any free process. The actual borders of
a slice depend only on the file, so the documents of all slices in sequence are the same regardless of the readers.
Other files must be read from their beginning, so each is one slice. In both cases memory grows at most with documents,
not with files.

JSON Lines: a document is the string under the text key of each line, which may be 64 MiB long. `plain_text` reads plain
text, `records` the other formats.
"""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import orjson

from data_pipeline.errors import DataError
from data_pipeline.sources.conversations import END_OF_STORED_SEGMENT, segments_of
from data_pipeline.sources.encodings import transcode
from data_pipeline.sources.formats import Format, format_of_named, open_input
from data_pipeline.sources.plain_text import AUTO, Division, Rule
from data_pipeline.sources.problems import Problems

SLICE = 64 << 20

_BLOCK = 4 << 20
LONGEST_RECORD = 64 << 20  # bytes held in memory at once: a line of JSON, a page of HTML
BOM = b"\xef\xbb\xbf"

TEXT_KEY = "text"  # unless the user names another
ON_ERROR = ("stop", "skip")
QUOTING = ("auto", "minimal", "none")  # of CSV, TSV: auto is minimal for CSV and none for TSV


@dataclass(frozen=True)
class Reading:
    """Reading options shared by all files of a preparation."""

    text_key: str
    on_error: str  # "stop" or "skip"
    score_key: str | None = None  # of JSON Lines
    conversations: bool = False  # lines of JSON hold them: see `conversations`
    encoding: str = ""  # Python's name of the user's encoding; "": UTF-8, which is checked
    quoting: str = "auto"  # of tables: one of QUOTING
    division: Division = field(default_factory=lambda: Division(Rule(AUTO)))  # of plain text


@dataclass(frozen=True)
class FileSlice:
    """Bytes [start, stop) of a file of `size` bytes; borders move to the beginnings of documents on reading."""

    path: str = field(repr=False)  # not in repr: moved files give the same work key
    start: int
    stop: int
    size: int
    encoding: str = ""  # converted to UTF-8 before reading; "": none

    @property
    def format(self) -> Format:
        return _format(self.path)

    @property
    def limit(self) -> float:
        """The end of the slice in the contents of the file; infinite if these are decompressed or converted, so read to
        the end.
        """
        return math.inf if self.format.compression or self.encoding else self.stop


def _format(path: str) -> Format:
    found = format_of_named(path)
    assert found is not None, "files that hold no text are refused when they are named"
    return found


def slices_of(path: str, size: int, division: Division, encoding: str = "") -> list[FileSlice]:
    """Return the slices of a file of `size` bytes; one if it must be read from the beginning."""
    found = _format(path)
    if encoding == "utf-8" or found.kind in ("html", "parquet"):
        encoding = ""
    divisible = found.divisible and not encoding and (found.kind != "text" or division.divisible)
    step = SLICE if divisible else max(size, 1)
    return [FileSlice(path, start, min(start + step, size), size, encoding) for start in range(0, size, step)]


@contextmanager
def opened(piece: FileSlice) -> Iterator[IO[bytes]]:
    """Open the contents of a file, decompressed and in UTF-8. Raises DataError if they cannot be read."""
    with open_input(piece.path, piece.format.compression) as file:
        if not piece.encoding:
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            transcode(file, copy, piece.encoding, piece.path)
            copy.seek(0)
            yield copy


def clean(document: bytes | str, problems: Problems) -> bytes:
    """Return a document as valid UTF-8 with LF as line end.

    Invalid UTF-8, or a lone surrogate in JSON, becomes U+FFFD; CRLF becomes LF; a single CR stays. All changes are
    counted.
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
            raw = decoded(raw, problems).encode("utf-8")
    if b"\r" in raw and b"\r\n" in raw:  # a search for one byte is several times as fast
        problems.count("crlf_line_ends", raw.count(b"\r\n"))
        raw = raw.replace(b"\r\n", b"\n")
    return raw


def is_blank(document: bytes) -> bool:
    """Return whether a document shows nothing: white space of any script, zero-width and other invisible characters."""
    text = document.lstrip()
    if not text or not (text[0] < 0x80 and text[0] > 0x20):
        return all(map(_is_invisible, text.decode("utf-8", "replace")))
    return False


@functools.lru_cache(maxsize=1 << 12)
def _is_invisible(character: str) -> bool:
    return (
        character.isspace()
        or unicodedata.category(character) in ("Cf", "Zs", "Zl", "Zp")
        or character in "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # fillers, and the blank of Braille
    )


def decoded(raw: bytes, problems: Problems) -> str:
    """Decode UTF-8; invalid bytes become U+FFFD and are counted."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        problems.count("invalid_utf8_documents")
        problems.count("replaced_characters", text.count("\ufffd") - raw.count("\ufffd".encode()))
        return text


def records(
    file: IO[bytes], piece: FileSlice, first: int, reading: Reading, problems: Problems
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin in a slice, with their positions; one that is too long is a broken line."""
    limit = piece.limit
    position = _line_start(file, piece.start, first)
    file.seek(position)
    while position < limit and (line := file.readline(LONGEST_RECORD)):
        begin, position = position, position + len(line)
        if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                position += len(rest)
            position += len(rest)
            error = ValueError(f"the line is longer than {LONGEST_RECORD >> 20} MiB")
            broken_line(piece, functools.partial(line_number, piece, begin), error, reading, problems)
        elif not line.isspace():
            yield begin, line


def lines(file: IO[bytes], piece: FileSlice, first: int, reading: Reading, problems: Problems) -> Iterator[bytes | str]:
    """Yield the documents of the lines of JSON that begin in a slice."""
    for begin, line in records(file, piece, first, reading, problems):
        try:
            yield document_of(line, reading, problems)
        except ValueError as error:
            broken_line(piece, functools.partial(line_number, piece, begin), error, reading, problems)


def broken_line(
    piece: FileSlice, number: Callable[[], int], error: Exception, reading: Reading, problems: Problems
) -> None:
    """Raise a DataError that names the line, or count it. `number` is called only if the line is named."""
    if reading.on_error != "skip":
        message = f"{piece.path}:{number()}: {error}"
        raise DataError(f"{message}; correct it, or leave such lines out with --on-error skip") from None
    problems.count("broken_lines", 1, f"{piece.path}:{number()}: {error}" if problems.wants_examples else "")


def document_of(line: bytes, reading: Reading, problems: Problems) -> bytes | str:
    """Return the document of a record, given as JSON. Raises ValueError if there is none."""
    try:
        record = _parsed(line, problems)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    text_key = reading.text_key
    if not isinstance(record, dict):
        wanted = "" if reading.conversations else f" with the key {text_key!r}"
        raise ValueError(f"expected an object{wanted}, got {type(record).__name__}")
    if reading.conversations:
        key = None if text_key == TEXT_KEY else text_key
        if key is not None:
            record = {**record, key: _value(record, key)}
        return bytes([END_OF_STORED_SEGMENT]).join(clean(text, problems) for text in segments_of(record, key))
    document = _value(record, text_key)
    if not isinstance(document, str):
        raise ValueError(f"{text_key!r} is not a string but {type(document).__name__}")
    if reading.score_key is not None:
        problems.score = _score_of(record, reading.score_key)
    return document


def _value(record: dict[str, Any], key: str) -> Any:
    try:
        return value_at(record, key)
    except KeyError as error:
        keys = error.args[0]
        raise ValueError(f"no key {key!r} (--text-key); the keys are: {', '.join(keys[:10])}") from None


def value_at(record: dict[str, Any], key: str) -> Any:
    """Return the value under a key, or under a path such as `meta.text`. Raises KeyError with the existing keys."""
    if key in record:
        return record[key]
    first, dot, rest = key.partition(".")
    if dot and isinstance(record.get(first), dict):
        try:
            return value_at(record[first], rest)
        except KeyError as error:
            raise KeyError([f"{first}.{name}" for name in error.args[0]]) from None
    raise KeyError([*map(str, record)])


def column_of(names: Sequence[str], key: str) -> str:
    """Return the column that holds the value under a key or a path."""
    return key if key in names else key.partition(".")[0]


def _parsed(line: bytes, problems: Problems) -> Any:
    """Parse a line of JSON; Python's parser handles what the fast one refuses (lone surrogates, NaN, invalid UTF-8)."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(decoded(line, problems))


def _score_of(record: dict[str, Any], key: str) -> float:
    try:
        score = value_at(record, key)
    except KeyError:
        score = None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"expected a number under {key!r} (--score-key), got {score!r}")
    return float(score)


def _line_start(file: IO[bytes], position: int, first: int) -> int:
    """Return the start of the first line at or after `position`."""
    if position <= first:
        return first
    file.seek(position - 1)
    while (line := file.readline(_BLOCK)) and not line.endswith(b"\n"):
        pass
    return file.tell()


def line_number(piece: FileSlice, position: int) -> int:
    """Return the number of the line that begins at `position`, counted only if a message needs it."""
    number = 1
    with opened(piece) as file:
        while position > 0 and (block := file.read(min(_BLOCK, position))):
            number += block.count(b"\n")
            position -= len(block)
    return number
