"""The documents of .json files: JSON Lines, an array of records, or consecutive records over several lines.

Records are delimited by their brackets and parsed one at a time, so memory grows with the longest record, not the file.
(ijson 3.6 silently replaces lone surrogates by question marks, and uses all memory for brackets nested 100,000 deep.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import IO

import orjson

from data_pipeline.errors import DataError
from data_pipeline.sources.text_files import (
    LONGEST_RECORD,
    FileSlice,
    Problems,
    Reading,
    broken_line,
    document_of,
    line_number,
    lines,
)

_BLOCK = 1 << 20
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\]')  # a string


def json_texts(
    file: IO[bytes], piece: FileSlice, first: int, reading: Reading, problems: Problems
) -> Iterator[bytes | str]:
    """Yield the documents of a .json file. A record without text is treated like a broken line of JSON Lines."""
    lines_of_json = _is_lines(file, first)
    file.seek(first)
    if lines_of_json:
        yield from lines(file, piece, first, reading, problems)
        return
    for begin, record in _records(file, piece.path, first):
        try:
            if record is None:
                raise ValueError(f"the record is longer than {LONGEST_RECORD >> 20} MiB")
            yield document_of(record, reading, problems)
        except ValueError as error:
            begin += len(record or b"") - len((record or b"").lstrip())
            broken_line(piece, functools.partial(line_number, piece, begin), error, reading, problems)


def _is_lines(file: IO[bytes], first: int) -> bool:
    """Return whether the first line that is not blank is a whole record."""
    if file.read(_BLOCK).lstrip().startswith(b"["):
        return False
    file.seek(first)
    while (line := file.readline(LONGEST_RECORD)).isspace():
        pass
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _records(file: IO[bytes], path: str, first: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield the position and the bytes of each record; None for one that is too long."""
    buffer, base, place = b"", first, 0  # base: position of the buffer in the file; place: where scanning continues
    start, too_long = first, False  # position of the record in the file
    array: bool | None = None  # records are elements of an array; None: not known yet
    depth, in_string = 0, False
    while block := file.read(_BLOCK):
        kept = place if too_long else start - base
        buffer, base, place = buffer[kept:] + block, base + kept, place - kept
        if array is None:
            place = len(buffer) - len(buffer.lstrip())
            array = buffer[place : place + 1] == b"[" if place < len(buffer) else None
            place += array is True
            start = base + place
        while found := (_INSIDE if in_string else _OUTSIDE).search(buffer, place):
            token, place = found[0], found.end()
            closed = False  # the record ends here
            if in_string:
                if token == b"\\" and place == len(buffer):
                    place -= 1  # the escaped character is in the next block
                    break
                in_string, place = token != b'"', place + (token == b"\\")
            elif token == b'"':
                in_string = True
            elif token in b"{[":
                depth += 1
            elif token == b",":
                closed = array is True and depth == 0
            elif depth:
                depth -= 1
                closed = not array and depth == 0
            elif array and token == b"]":
                if too_long or buffer[start - base : found.start()].strip():
                    yield start, None if too_long else buffer[start - base : found.start()]
                if rest := (buffer[place:] + file.read(_BLOCK)).strip():
                    raise DataError(
                        f"cannot continue reading {path}: expected nothing after its array, got {rest[:40]!r}"
                    )
                return
            if closed:
                stop = found.start() if array else place
                yield start, None if too_long else buffer[start - base : stop]
                start, too_long = base + place, False
        else:
            place = len(buffer)
        too_long = too_long or base + len(buffer) - start > LONGEST_RECORD
    if array:
        raise DataError(f"cannot read {path}: it was cut short: its array has no end")
    if too_long or buffer[start - base :].strip():
        yield start, None if too_long else buffer[start - base :]
