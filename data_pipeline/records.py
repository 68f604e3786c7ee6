"""The documents of pages and tables: HTML, CSV and Parquet.

HTML: a page is a document: its main text without navigation, scripts and the like, as Resiliparse finds it (Bevendorff
et al. 2018, ECIR; the extractor of DataComp-LM, Li et al. 2024, arXiv 2406.11794, section 4.2). A page is read in the
encoding that it names, UTF-8 otherwise.

CSV: the first row names the columns; a document is a cell of the text column. Parquet: the same; a slice holds the row
groups that begin in it.
"""

from __future__ import annotations

import csv
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from data_pipeline.errors import DataError
from data_pipeline.extras import how_to_install
from data_pipeline.plurals import number_of
from data_pipeline.textfiles import LONGEST_RECORD, FileSlice, Problems, Reading, broken_line, column_of, decoded

_BATCH_BYTES, _BATCH_ROWS = 8 << 20, 1 << 14  # of a Parquet column, decoded at a time
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.IGNORECASE)
_CHARSET_WITHIN = 1024  # bytes: where the HTML standard requires it to stand


def page_text(file: IO[bytes], piece: FileSlice, problems: Problems) -> Iterator[str]:
    """The text of one page of HTML; nothing if it shows none."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise DataError(f"{piece.path}: reading HTML needs resiliparse: {how_to_install('resiliparse')}") from None
    page = file.read(LONGEST_RECORD + 1)
    if len(page) > LONGEST_RECORD:
        raise DataError(f"cannot read {piece.path}: a page of HTML may have {LONGEST_RECORD >> 20} MiB at most")
    yield extract_plain_text(_decoded(page, problems), preserve_formatting=True, main_content=True)


def _decoded(page: bytes, problems: Problems) -> str:
    """A page in UTF-8, or in the encoding that it names if it is not UTF-8 but valid in that."""
    named = _CHARSET.search(page[:_CHARSET_WITHIN])
    for encoding in ("utf-8", named[1].decode() if named else "utf-8"):
        with suppress(UnicodeError, LookupError):
            return page.decode(encoding)
    return decoded(page, problems)


def table_texts(file: IO[bytes], piece: FileSlice, reading: Reading, problems: Problems) -> Iterator[bytes]:
    """The cells of the text column of a CSV file, read from where `file` stands.

    A row without that cell is a broken line. Raises DataError where the column is missing or the rest cannot be read.
    """
    csv.field_size_limit(LONGEST_RECORD)
    delimiter = "\t" if ".tsv" in piece.path.lower()[-8:] else ","
    rows = csv.reader(_table_lines(file, piece), delimiter=delimiter)
    try:
        header = next(rows, [])
        if header and reading.text_key not in header:
            raise DataError(_no_column(piece.path, reading.text_key, header))
        place = header.index(reading.text_key) if header else 0
        for row in rows:
            if len(row) > place:
                yield row[place].encode("utf-8", "surrogateescape")
            elif row:
                error = ValueError(f"the row has {number_of(len(row), 'column')}, expected {len(header)}")
                broken_line(piece, lambda: rows.line_num, error, reading, problems)
    except csv.Error as error:
        raise DataError(f"cannot read on at {piece.path}:{rows.line_num}: {error}") from None


def _table_lines(file: IO[bytes], piece: FileSlice) -> Iterator[str]:
    """Lines with what is not valid UTF-8 as surrogates, which `table_texts` turns back into the bytes that it was."""
    while line := file.readline(LONGEST_RECORD):
        if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
            raise DataError(f"cannot read {piece.path}: a line is longer than {LONGEST_RECORD >> 20} MiB")
        yield line.decode("utf-8", "surrogateescape")


def parquet_texts(file: IO[bytes], piece: FileSlice, reading: Reading) -> Iterator[bytes]:
    """The strings of the text column in the row groups that begin in a slice of a Parquet file, as their bytes."""
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
                        # As bytes, for they may be invalid UTF-8. An empty cell is an empty document.
                        yield from (text or b"" for text in column.cast(pyarrow.large_binary()).to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {piece.path}: {str(error).splitlines()[0]}") from error


def _begin(row_group: Any) -> int:
    """The place in the file where a row group begins."""
    first = row_group.column(0)
    places = (first.dictionary_page_offset, first.data_page_offset)
    return min(place for place in places if place)


def _check_column(schema: Any, path: str, text_key: str) -> list[str]:
    """The fields that lead to the text within its column: of `meta.text`, [text]. DataError if there is none."""
    name = column_of(schema.names, text_key)
    within = text_key.removeprefix(name).split(".")[1:]
    if name not in schema.names:
        raise DataError(_no_column(path, text_key, schema.names))
    kind = schema.field(name).type
    for part in within:
        fields = [kind.field(place).name for place in range(kind.num_fields)] if str(kind).startswith("struct") else []
        if part not in fields:
            raise DataError(_no_column(path, text_key, schema.names))
        kind = kind.field(fields.index(part)).type
    if not re.search("string|binary", str(kind)) or kind.num_fields:
        raise DataError(f"the column {text_key!r} of {path} holds {kind}, expected text; {_columns(schema.names)}")
    return within


def _no_column(path: str, text_key: str, columns: list[str]) -> str:
    return f"{path} has no column {text_key!r} (--text-key); {_columns(columns)}"


def _columns(names: list[str]) -> str:
    return f"its columns are: {', '.join(names[:50])}"
