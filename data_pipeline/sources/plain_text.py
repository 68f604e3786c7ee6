"""Documents of plain text: the rule that divides files into documents, and reading in bounded memory.

    auto            A line that holds only a known separator ends a document, and is removed. A file without such lines
                    is one document. If that gives fewer than 100 documents, those above 64 KiB are cut at blank
                    lines, so that some can be held back for validation; a document above 64 MiB is always cut.
    file            A file is one document.
    separator=TEXT  A line that holds only TEXT ends a document. If no line does, TEXT ends one wherever it occurs.
    paragraphs      Blank lines end a document.
    lines           Each line is one document.

Markup (Markdown, reStructuredText) may quote a separator as an example, so `auto` does not search for one there. Spaces
around a separator and CRLF make no difference. Documents never cross files, and blank lines around them are dropped.

Large files are read in slices. Each border between slices moves to the next place where a document begins. That place
depends only on the file, so the documents are the same regardless of which process reads them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Protocol

from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.sources.encodings import in_utf8
from data_pipeline.sources.formats import format_of_named, is_markup, open_input

AUTO, FILE, SEPARATOR, PARAGRAPHS, LINES = "auto", "file", "separator", "paragraphs", "lines"
RULES = f"{AUTO}, {FILE}, {SEPARATOR}=TEXT, {PARAGRAPHS} or {LINES}"
KNOWN_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

ENOUGH = 100  # documents; enough to hold some back for validation
PIECE = 64 << 10  # bytes: longer documents are cut if there are fewer than ENOUGH
_SMALLEST_PIECE = 1 << 10
_LONGEST_WHOLE = 64 << 20  # bytes: `auto` always cuts longer documents
LONGEST_DOCUMENT = 1 << 30  # bytes; shards count the ids of a document in 32 bits
_LOOKED_AT = 16 << 20  # bytes at the beginning of a file that are searched for separators
_BLOCK = 4 << 20
_CONTEXT = 1 << 10  # bytes: longer than any line that holds only a separator, or only spaces

# Files that are one document: name of the count, and the word in messages.
_FILES = {"whole files": "file", "markup files": "Markdown or reStructuredText file"}

_WITHIN = "within lines: "  # prefix of the counts of separators there

_BLANK_LINES = re.compile(rb"\n(?:[ \t]{0,99}\r?\n)+")
_REST_OF_LINE = re.compile(rb"[ \t]{0,99}(?:\r?\n|\r?\Z)")


@dataclass(frozen=True)
class Rule:
    """The rule that a user requested."""

    kind: str
    separator: str = ""

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse the rule of `--documents`. Raises DataError for an unknown one."""
        kind, equals, separator = text.partition("=")
        if kind == SEPARATOR and equals:
            separator = separator.replace("\\n", "\n").replace("\\t", "\t").replace("\r\n", "\n")
            if not separator.strip(" \t"):
                raise DataError(f"--documents {SEPARATOR}=TEXT: expected a text that separates documents, got none")
            if "\n" not in separator:
                separator = separator.strip(" \t")
            return cls(kind, separator)
        if equals or kind not in (AUTO, FILE, PARAGRAPHS, LINES):
            raise DataError(f"--documents {text!r} is unknown: expected {RULES}")
        return cls(kind)

    def __str__(self) -> str:
        return f"{self.kind}={self.separator}" if self.separator else self.kind

    @property
    def typed(self) -> str:
        """The rule as given on the command line."""
        return str(self).replace("\n", "\\n").replace("\t", "\\t")


@dataclass(frozen=True)
class Division:
    """The division of one preparation's text: a rule, and parameters determined from the files."""

    rule: Rule
    limit: int = LONGEST_DOCUMENT  # bytes; `auto` cuts longer documents
    piece: int = PIECE  # bytes of the pieces
    anywhere: bool = False  # the separator also ends a document within a line

    @property
    def divisible(self) -> bool:
        """True if a part of a plain file can be read without the preceding parts."""
        return self.rule.kind != FILE and not self.anywhere

    @property
    def cuts(self) -> bool:
        """True if documents above `limit` are cut; otherwise they are refused."""
        return self.rule.kind == AUTO

    def boundary(self, path: str) -> Boundary:
        """Return the boundary that ends documents in a file."""
        if self.rule.kind == SEPARATOR:
            return Text(self.rule.separator) if self.anywhere else Alone((self.rule.separator,))
        if self.rule.kind == PARAGRAPHS:
            return BlankLines()
        return Alone(KNOWN_SEPARATORS if self.rule.kind == AUTO and not is_markup(path) else ())


@dataclass(frozen=True)
class Found:
    """A boundary between documents: bytes [start, stop) of a buffer; `name` is its key in the counts."""

    start: int
    stop: int
    name: str


class Boundary(Protocol):
    """A pattern that ends a document."""

    def find(self, buffer: bytes, start: int, final: bool, first: bool) -> Found | None:
        """Return the first certainly complete boundary at or after `start`. first: the buffer begins at the start of
        the file.
        """
        ...

    def resume(self, buffer: bytes) -> int:
        """Return where to continue the search once more data is appended to a buffer without a boundary."""
        ...


class Alone:
    """A line that holds only one of some separators, and spaces."""

    def __init__(self, separators: Sequence[str]) -> None:
        self._separators = re.compile(b"|".join(re.escape(one.encode()) for one in separators)) if separators else None

    def find(self, buffer: bytes, start: int, final: bool, first: bool) -> Found | None:
        for candidate in self._separators.finditer(buffer, start) if self._separators else ():
            line = buffer.rfind(b"\n", max(candidate.start() - _CONTEXT, 0), candidate.start()) + 1
            if buffer[line : candidate.start()].strip(b" \t") or not (line or first):
                continue
            if rest := _REST_OF_LINE.match(buffer, candidate.end()):
                if not final and not rest[0].endswith(b"\n"):
                    return None  # the line may continue in the next block
                return Found(line, rest.end(), candidate[0].decode())
        return None

    def resume(self, buffer: bytes) -> int:
        return _last_line(buffer)


class Text:
    """A text, wherever it occurs."""

    def __init__(self, separator: str) -> None:
        self._name = separator
        self._separator = separator.encode()

    def find(self, buffer: bytes, start: int, final: bool, first: bool) -> Found | None:
        place = buffer.find(self._separator, start)
        return None if place < 0 else Found(place, place + len(self._separator), self._name)

    def resume(self, buffer: bytes) -> int:
        return max(len(buffer) - len(self._separator) + 1, 0)


class BlankLines:
    """One or more blank lines."""

    def find(self, buffer: bytes, start: int, final: bool, first: bool) -> Found | None:
        found = _BLANK_LINES.search(buffer, start)
        if found is None or (found.end() == len(buffer) and not final):  # more blank lines may follow
            return None
        return Found(found.start(), found.end(), "blank lines")

    def resume(self, buffer: bytes) -> int:
        if found := re.search(rb"\n[ \t\r\n]*\Z", buffer[-_CONTEXT:]):
            return max(len(buffer) - _CONTEXT, 0) + found.start()
        return len(buffer)


def _last_line(buffer: bytes) -> int:
    """Return the start of the last line if it is short enough to be a boundary; else the end of the buffer."""
    place = buffer.rfind(b"\n", max(len(buffer) - _CONTEXT, 0))
    return place + 1 if place >= 0 else 0 if len(buffer) < _CONTEXT else len(buffer)


def choose(
    rule: Rule, files: Sequence[tuple[str, int]], others: int, split: bool = True, encoding: str = ""
) -> Division:
    """Determine the division of the text: whether documents must be cut, and whether a separator stands alone on a
    line.

    files: path and size of each file of plain text. others: files of other formats, and other inputs. split: some
    documents are held back for validation. encoding: of the files; "" for UTF-8.
    """
    if rule.kind == SEPARATOR:
        return Division(rule, anywhere="\n" in rule.separator or not _stands_alone(rule.separator, files, encoding))
    if rule.kind != AUTO:
        return Division(rule)
    documents = len(files) if split else ENOUGH
    for path, size in files if documents < ENOUGH else ():
        documents += _count(
            path, size, Alone(() if is_markup(path) else KNOWN_SEPARATORS), ENOUGH - documents, encoding
        )
        if documents >= ENOUGH:
            break
    if documents >= ENOUGH:
        return Division(rule, limit=_LONGEST_WHOLE)
    if documents == 1 and not others:  # there must be at least two
        [(path, size)] = files
        piece = min(
            max(size // 16, len(_beginning(path, encoding)) // 16, _SMALLEST_PIECE), PIECE
        )  # it may be compressed
        return Division(rule, limit=piece, piece=piece)
    return Division(rule, limit=PIECE, piece=PIECE)


def _count(path: str, size: int, boundary: Boundary, enough: int, encoding: str) -> int:
    """Estimate the number of boundaries in a file: those in its first 16 MiB, in proportion to its size."""
    count = place = 0
    beginning = _beginning(path, encoding)
    final = len(beginning) < _LOOKED_AT
    while count < enough and (found := boundary.find(beginning, place, final, first=True)):
        rest = beginning[found.stop : found.stop + _CONTEXT]
        count += bool(rest.strip())  # the last one has nothing after it
        place = found.stop
    return count if final else count * max(size // len(beginning), 1)


def _stands_alone(separator: str, files: Sequence[tuple[str, int]], encoding: str) -> bool:
    """Return whether a separator stands alone on a line; True also if it occurs nowhere, so that large files can be
    divided.
    """
    occurs = False
    for path, _ in files:
        beginning = _beginning(path, encoding)
        if Alone((separator,)).find(beginning, 0, len(beginning) < _LOOKED_AT, first=True):
            return True
        occurs = occurs or separator.encode() in beginning
    return not occurs


def _beginning(path: str, encoding: str) -> bytes:
    """Return the first 16 MiB of a file, in UTF-8; b"" if it cannot be read, which is reported later."""
    with suppress(DataError):
        found = format_of_named(path)
        with open_input(path, found.compression if found else "") as file:
            beginning = file.read(_LOOKED_AT)
        return in_utf8(beginning, encoding).removeprefix(b"\xef\xbb\xbf")
    return b""


def divided(
    file: IO[bytes],
    name: str,
    span: tuple[int, float],
    first: int,
    size: int,
    division: Division,
    counts: Counter[str],
) -> Iterator[bytes]:
    """Yield the documents of plain text that begin in a slice.

    span: its bytes [start, stop), stop infinite for a compressed file. first: start of the text, after a byte-order
    mark. size: of the file. counts: of boundaries by name, of files that are one document, and of "cut" documents with
    their "pieces".
    """
    boundary, limit = division.boundary(name), division.limit
    start, left = span[0], float("inf")
    whole = span[0] == 0 and span[1] >= size
    if span[1] < float("inf"):
        start = _document_start(file, span[0], first, size, boundary, division)
        left = _document_start(file, int(span[1]), first, size, boundary, division) - start
    else:
        start = first
    if left <= 0:
        return
    file.seek(max(start - 1, first))
    buffer = file.read(1) if start > first else b""  # shows whether the slice begins with a line
    begin = search = len(buffer)
    at_first, cutting, found_any = start == first, False, False

    def finished(text: bytes) -> Iterator[bytes]:
        if cutting or len(text) > limit:
            pieces = [piece for piece in _pieces(text, division.piece) if piece.strip()]
            counts["cut"] += not cutting
            counts["pieces"] += len(pieces)
            yield from (piece.strip(b"\r\n") for piece in pieces)
        elif text.strip():
            yield text.strip(b"\r\n")

    while True:
        block = file.read(int(min(max(_BLOCK, len(buffer)), left))) if left > 0 else b""
        if not block and 0 < left < float("inf"):
            raise DataError(f"cannot read {name}: it became shorter while it was read")
        left -= len(block)
        final = not block or left == 0
        kept = max(begin - 1, 0)  # the byte before the document shows whether a line begins there
        buffer, begin, search, at_first = buffer[kept:] + block, begin - kept, search - kept, at_first and not kept
        while found := boundary.find(buffer, search, final, at_first):
            found_any = True
            counts[found.name] += 1
            yield from finished(buffer[begin : found.start])
            begin = search = found.stop
            cutting = False
        if final:
            break
        search = max(boundary.resume(buffer), begin)
        if division.cuts and (cutting or search - begin > limit):
            counts["cut"] += not cutting
            cutting = True
            while search - begin > division.piece:
                begin += (length := _piece_length(buffer[begin : begin + division.piece]))
                if piece := buffer[begin - length : begin].strip(b"\r\n"):
                    counts["pieces"] += 1
                    yield piece
        elif len(buffer) - begin > LONGEST_DOCUMENT:
            raise DataError(
                f"{name}: a document has more than {LONGEST_DOCUMENT >> 30} GiB; choose another rule with --documents: "
                f"{RULES}"
            )
    last = buffer[begin:]
    if whole and not found_any and not last.strip():
        yield b""  # a file without text: the caller counts it
    elif whole and not found_any and not cutting and len(last) <= limit:
        counts["markup files" if division.rule.kind == AUTO and is_markup(name) else "whole files"] += 1
    yield from finished(last)


def count_within_lines(document: bytes, name: str, division: Division, counts: Counter[str]) -> None:
    """Count the known separators within a document, if `auto` searches its file for lines of them."""
    if division.rule.kind == AUTO and not is_markup(name):
        for separator in KNOWN_SEPARATORS:
            if number := document.count(separator.encode()):
                counts[_WITHIN + separator] += number


def _pieces(text: bytes, longest: int) -> Iterator[bytes]:
    begin = 0
    while len(text) - begin > longest:
        length = _piece_length(text[begin : begin + longest])
        yield text[begin : begin + length]
        begin += length
    yield text[begin:]


def _piece_length(window: bytes) -> int:
    """Return where to cut a document that is longer than `window`.

    The cut is after the last blank line in it; otherwise after the last line end, space, or whole character.
    """
    blanks = [found for found in _BLANK_LINES.finditer(window) if found.start()]
    if blanks and window[: blanks[-1].start()].strip():
        return blanks[-1].end()
    for separator in (b"\n", b" "):
        if found := window.rfind(separator) + 1:
            return found
    length = len(window)
    for back in range(1, min(4, length)):
        if window[-back] & 0xC0 == 0xC0:  # the first byte of a character that may continue after the window
            return length - back
        if window[-back] & 0xC0 != 0x80:
            break
    return length


def _document_start(
    file: IO[bytes], position: int, first: int, size: int, boundary: Boundary, division: Division
) -> int:
    """Return the first place at or after `position` where a document, or a piece of one that is cut, may begin."""
    if position <= first:
        return first
    if position >= size:
        return size
    base = max(position - _CONTEXT, first)
    file.seek(base)
    buffer, search = b"", int(base > first)
    while base + len(buffer) - position <= division.limit:
        block = file.read(min(max(_BLOCK, len(buffer)), size - base - len(buffer)))
        buffer += block
        final = not block or base + len(buffer) == size
        while found := boundary.find(buffer, search, final, base == first):
            search = found.stop
            if base + found.stop >= position:
                return min(base + found.stop, size)
        if final:
            return size
        search = max(boundary.resume(buffer), search)
    if not division.cuts:
        return size  # the reader of the preceding document reports that it is too long
    window = buffer[position - base :][: division.piece]
    if blank := _BLANK_LINES.search(window):
        return position + blank.end()
    for separator in (b"\n", b" "):
        if place := window.find(separator) + 1:
            return position + place
    return position + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def describe(division: Division, counts: Mapping[str, int]) -> list[str]:
    """Describe the chosen division and the reason, in sentences. counts: of `divided`, over all files."""
    rule, lines = division.rule, []
    others = {
        name: number
        for name, number in counts.items()
        if name not in (*_FILES, "cut", "pieces") and not name.startswith(_WITHIN)
    }
    asked = "" if rule.kind == AUTO else f" (--documents {rule.typed})"
    for name, number in others.items():
        if name == "lines":
            lines.append(f"each line is a document{asked}")
        elif name == "blank lines":
            lines.append(f"blank lines separate documents{asked}")
        else:
            line, occurrence = ("lines that hold", "occurrences") if number > 1 else ("line that holds", "occurrence")
            where = f"{occurrence} of" if division.anywhere else f"{line} only"
            verbs = ("separate", "are") if number > 1 else ("separates", "is")
            lines.append(f"{number:,} {where} {name!r} {verbs[0]} documents, and {verbs[1]} left out{asked}")
    for name, kind in _FILES.items():
        if number := counts.get(name, 0):
            why = asked or (": no line holds only a separator" if name == "whole files" else "")
            each = "s are one document each" if number > 1 else " is one document"
            lines.append(f"{number:,} {kind}{each}{why}")
    if counts.get("cut", 0):
        why = (
            f"fewer than {ENOUGH} documents are too few to hold some back for validation"
            if division.limit < _LONGEST_WHOLE
            else "longer documents take too much memory"
        )
        size = _size(division.limit)
        lines.append(f"text above {size} without a separator is cut at blank lines, into {counts['pieces']:,}: {why}")
    for name in KNOWN_SEPARATORS:
        if (number := counts.get(_WITHIN + name, 0)) and not counts.get(name, 0):
            times = number_of(number, "time")
            lines.append(
                f"{name!r} stands {times} within lines, where it is text: --documents 'separator={name}' makes it "
                "separate documents"
            )
    return lines


def check_found(division: Division, counts: Mapping[str, int]) -> None:
    """Raise DataError if no text holds the separator that the user named."""
    if division.rule.kind == SEPARATOR and not counts.get(division.rule.separator):
        raise DataError(
            f"--documents {division.rule.typed}: the text nowhere holds {division.rule.separator!r}, so nothing is "
            f"divided; expected {RULES}"
        )


def _size(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{number_of(size, 'byte')}"
