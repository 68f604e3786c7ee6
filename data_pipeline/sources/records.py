"""The documents of pages and tables: HTML, CSV and Parquet.

HTML: a page is a document: its main text without navigation, scripts and the like, as Resiliparse extracts it
(Bevendorff et al. 2018, ECIR; the extractor of DataComp-LM, Li et al. 2024, arXiv 2406.11794, section 4.2). `pages`
determines its encoding.

CSV: the first row names the columns; a document is a cell of the text column. Parquet: the same; a slice holds the row
groups that begin in it.
"""

from __future__ import annotations

import csv
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

from data_pipeline.errors import DataError
from data_pipeline.extras import how_to_install
from data_pipeline.plurals import number_of
from data_pipeline.sources.pages import beyond_limits, decoded_page
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.text_files import LONGEST_RECORD, FileSlice, Reading, broken_line, column_of

_BATCH_BYTES, _BATCH_ROWS = 8 << 20, 1 << 14  # of a Parquet column, decoded at a time
_LIKE_ROWS = 2  # lines of one cell that all look like rows: its quote may be unmatched


def page_text(file: IO[bytes], piece: FileSlice, reading: Reading, problems: Problems) -> Iterator[str]:
    """Yield the text of one page of HTML; nothing if it shows none, or is too deep or too large for the parser."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise DataError(f"{piece.path}: reading HTML needs resiliparse: {how_to_install('resiliparse')}") from None
    page = file.read(LONGEST_RECORD + 1)
    if len(page) > LONGEST_RECORD:
        raise DataError(f"cannot read {piece.path}: a page of HTML may have {LONGEST_RECORD >> 20} MiB at most")
    if why := beyond_limits(page):
        problems.leave_out("pages_beyond_limits", f"{piece.path}: {why}")
        return
    text, broken = decoded_page(page, piece.path, reading.encoding)
    problems.count("invalid_utf8_documents", int(broken > 0))
    problems.count("replaced_characters", broken)
    yield extract_plain_text(text, preserve_formatting=True, main_content=True)


def table_texts(file: IO[bytes], piece: FileSlice, reading: Reading, problems: Problems) -> Iterator[bytes]:
    """Yield the cells of the text column of a CSV or TSV file, from the current position of `file`.

    A row without that cell, with extra cells, or with an unmatched quote is a broken line. Raises DataError if the
    column is missing or the rest cannot be read.
    """
    csv.field_size_limit(LONGEST_RECORD)
    tabs = ".tsv" in piece.path.lower()[-9:]
    delimiter = "\t" if tabs else ","
    quoted = reading.quoting == "minimal" or (reading.quoting == "auto" and not tabs)
    lines = _Lines(file, piece)
    rows = _quoted_rows(lines, delimiter, reading, problems) if quoted else _plain_rows(lines, delimiter)
    header: list[str] = []
    for begin, row in rows:
        if not header:
            header = row
            _check_header(header, piece.path, reading.text_key, quoted)
            place = header.index(reading.text_key)
        elif len(row) > place and not any(row[len(header) :]):
            yield row[place].encode("utf-8", "surrogateescape")
        else:
            error = ValueError(f"the row has {number_of(len(row), 'column')}, expected {len(header)}")
            broken_line(piece, partial(int, begin), error, reading, problems)


def _check_header(header: list[str], path: str, text_key: str, quoted: bool) -> None:
    if header.count(text_key) == 1:
        return
    if text_key in header:
        raise DataError(_repeated(path, text_key, header.count(text_key)))
    hint = (
        "; with --quoting minimal the quotes are not part of the names"
        if f'"{text_key}"' in header and not quoted
        else ""
    )
    raise DataError(_no_column(path, text_key, header) + hint)


class _Lines:
    """The lines of a table, which may be given back. Invalid UTF-8 becomes surrogates, for `table_texts`."""

    def __init__(self, file: IO[bytes], piece: FileSlice) -> None:
        self._file, self.piece = file, piece
        self._returned: list[str] = []  # the next one last
        self.taken: list[str] = []  # since the last row
        self.number = 0  # of the last line taken

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        text = self._returned.pop() if self._returned else self._read()
        self.taken.append(text)
        self.number += 1
        return text

    def _read(self) -> str:
        line = self._file.readline(LONGEST_RECORD)
        if not line:
            raise StopIteration
        if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            raise DataError(f"cannot read {self.piece.path}: a line is longer than {LONGEST_RECORD >> 20} MiB")
        return line.decode("utf-8", "surrogateescape")

    def give_back(self) -> None:
        """Give back the lines taken since the last row, except the first."""
        self.number -= len(self.taken) - 1
        self._returned += reversed(self.taken[1:])


def _plain_rows(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each row, with quotes as text."""
    for line in lines:
        lines.taken.clear()
        if text := line.rstrip("\r\n"):
            yield lines.number, text.split(delimiter)


def _quoted_rows(
    lines: _Lines, delimiter: str, reading: Reading, problems: Problems
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the cells of each row; a quoted cell may span several lines.

    An unmatched quote also makes such a row, and swallows the rows up to the next quote, but then the quotes do not fit
    the cells. In this case only the first line is broken, and the lines after it are read as rows.
    """
    reader = csv.reader(lines, delimiter=delimiter)
    columns = 0
    while True:
        begin = lines.number + 1
        lines.taken.clear()
        try:
            row = next(reader, None)
            whole = not _may_be_broken(lines.taken) or _is_row(lines.taken, delimiter)
        except csv.Error as broken:
            if lines.taken and "\r" in lines.taken[-1].rstrip("\r\n"):
                raise DataError(
                    f"cannot continue reading at {lines.piece.path}:{lines.number}: a carriage return (CR) within a "
                    "line; if CR ends its lines, convert it: tr '\\r' '\\n' < FILE > NEW"
                ) from None
            if len(lines.taken) <= 1:
                raise DataError(f"cannot continue reading at {lines.piece.path}:{lines.number}: {broken}") from None
            row, whole = [], False
        if row is None:
            return
        if not whole:
            error = ValueError(
                f"a quote without a partner: the row would swallow the lines up to {lines.number}; with --quoting none "
                f"quotes are text"
            )
            broken_line(lines.piece, partial(int, begin), error, reading, problems)
            lines.give_back()
            continue
        columns = columns or len(row)
        inner = lines.taken[1:-1]
        if len(inner) >= _LIKE_ROWS and columns > 1 and all(one.count(delimiter) == columns - 1 for one in inner):
            place = f"{lines.piece.path}:{begin}: a cell of {len(lines.taken)} lines that look like rows"
            problems.count("cells_like_rows", 1, place)
        if row:
            yield begin, row


def _may_be_broken(lines: list[str]) -> bool:
    """Return whether the quotes of a row may not fit: it spans several lines, or the file ends within a cell."""
    return len(lines) > 1 or sum(line.count('"') for line in lines) % 2 == 1


def _is_row(lines: list[str], delimiter: str) -> bool:
    """Return whether lines are one row with all quotes in valid positions."""
    try:
        return len(list(csv.reader(lines, delimiter=delimiter, strict=True))) == 1
    except csv.Error:
        return False


def parquet_texts(file: IO[bytes], piece: FileSlice, reading: Reading) -> Iterator[bytes]:
    """Yield the strings of the text column, as bytes, in the row groups that begin in a slice of a Parquet file."""
    import pyarrow.compute
    from pyarrow import parquet

    with tempfile.TemporaryFile() as copy:
        if piece.format.compression:  # a Parquet file is read from its end
            shutil.copyfileobj(file, copy, 1 << 20)
        try:
            table = parquet.ParquetFile(copy if piece.format.compression else file, buffer_size=1 << 20)
            within = _check_column(table.schema_arrow, piece.path, reading.text_key)
            places = [table.schema.column(place).path for place in range(len(table.schema))]
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                if group.num_rows and piece.start <= _begin(group) < piece.limit:
                    size = group.column(places.index(reading.text_key)).total_uncompressed_size
                    rows = min(max(_BATCH_BYTES * group.num_rows // max(size, 1), 1), _BATCH_ROWS)
                    for batch in table.iter_batches(rows, row_groups=[number], columns=[reading.text_key]):
                        column = batch.column(0)
                        if pyarrow.types.is_struct(column.type):
                            column = pyarrow.compute.struct_field(column, within)
                        if isinstance(column, pyarrow.DictionaryArray):
                            column = column.dictionary_decode()
                        # As bytes, because they may be invalid UTF-8. An empty cell is an empty document.
                        yield from (text or b"" for text in column.cast(pyarrow.large_binary()).to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {piece.path}: {str(error).splitlines()[0]}") from error


def _begin(row_group: Any) -> int:
    """Return the position of a row group in the file."""
    first = row_group.column(0)
    places = (first.dictionary_page_offset, first.data_page_offset)
    return min(place for place in places if place)


def _check_column(schema: Any, path: str, text_key: str) -> list[str]:
    """Return the fields that lead to the text within its column: for `meta.text`, [text]. Raises DataError if there is
    none.
    """
    name = column_of(schema.names, text_key)
    within = text_key.removeprefix(name).split(".")[1:]
    if name not in schema.names:
        raise DataError(_no_column(path, text_key, schema.names))
    if schema.names.count(name) > 1:
        raise DataError(_repeated(path, name, schema.names.count(name)))
    kind = schema.field(name).type
    for part in within:
        fields = [kind.field(place).name for place in range(kind.num_fields)] if str(kind).startswith("struct") else []
        if part not in fields:
            raise DataError(_no_column(path, text_key, schema.names))
        kind = kind.field(fields.index(part)).type
    if not re.search("string|binary", str(kind)) or kind.num_fields:
        raise DataError(f"the column {text_key!r} of {path} holds {kind}, expected text; {_columns(schema.names)}")
    return within


def _repeated(path: str, text_key: str, number: int) -> str:
    return f"{path} has {number} columns called {text_key!r}: which is the text? Rename the others"


def _no_column(path: str, text_key: str, columns: list[str]) -> str:
    return f"{path} has no column {text_key!r} (--text-key); {_columns(columns)}"


def _columns(names: list[str]) -> str:
    return f"its columns are: {', '.join(names[:50])}"
