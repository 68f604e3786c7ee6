"""The format of a file, by its name: the layout of its text, and its compression.

    text    plain text: see `plain_text` for its division into documents
    html    a page: one document, the text that a reader sees
    jsonl   JSON Lines: a document is the string under the text key
    json    JSON Lines, an array of such records, or records over any number of lines
    csv     tables with a header; a document is a cell of the text column. tsv: the same with tabs
    parquet columns; a document is a string of the text column

Each may also be compressed: .gz, .bz2, .xz or .zst, with any number of streams in one file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, cast

from data_pipeline.errors import DataError

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

SUFFIXES = {
    "text": (".txt", ".text", ".md", ".markdown", ".rst"),
    "html": (".html", ".htm", ".xhtml"),
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
MARKUP = (".md", ".markdown", ".rst")  # plain text that may quote a document separator as an example
_BUFFER = 256 << 10  # bytes read at a time: lines of JSON are often longer than the default of a few kilobytes
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# A file of an unknown kind that the user names is read as plain text, except these.
NOT_TEXT = frozenset(
    f".{suffix}"
    for suffix in re.findall(r"\w+", "arrow xml pdf doc docx odt epub zip tar tgz 7z rar pkl pt npy npz safetensors")
)
READABLE = (
    "; ".join(f"{kind}: {', '.join(suffixes)}" for kind, suffixes in SUFFIXES.items())
    + f"; each also with {', '.join(COMPRESSED)}"
)


@dataclass(frozen=True)
class Format:
    """The format of a file. kind: a key of SUFFIXES. compression: one of COMPRESSED, or ""."""

    kind: str
    compression: str

    @property
    def divisible(self) -> bool:
        """True if any part of a file can be read without the preceding parts."""
        return not self.compression and self.kind in ("text", "jsonl", "parquet")


def compression_of(path: str | os.PathLike[str]) -> str:
    """Return the compression of a file by its name: one of COMPRESSED, "" for none."""
    name = os.path.basename(os.fspath(path)).lower()
    return next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")


def format_of(path: str | os.PathLike[str]) -> Format | None:
    """Return the format by a file's name; None if it is not supported."""
    name = os.path.basename(os.fspath(path)).lower()
    compression = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    suffix = os.path.splitext(name.removesuffix(compression))[1]
    kind = next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
    return None if kind is None else Format(kind, compression)


def format_of_named(path: str | os.PathLike[str]) -> Format | None:
    """Return the format of a file that a user named: plain text if it is unknown, None if the suffix is not of text."""
    name = os.path.basename(os.fspath(path)).lower()
    compression = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    if os.path.splitext(name.removesuffix(compression))[1] in NOT_TEXT:
        return None
    return format_of(path) or Format("text", compression)


def is_markup(path: str | os.PathLike[str]) -> bool:
    """Return whether a plain-text file is Markdown or reStructuredText, by its name."""
    name = os.path.basename(os.fspath(path)).lower()
    compression = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return name.removesuffix(compression).endswith(MARKUP)


@contextmanager
def open_input(path: str, compression: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed. Raises DataError if it cannot be read, is damaged or was cut short."""
    try:
        with _open(path, compression) as file:
            yield file
    except EOFError:
        raise DataError(f"cannot read {path}: it was cut short: its last compressed stream has no end") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        raise DataError(f"cannot read {path}: its {compression} compression is damaged: {error}") from None
    except OSError as error:
        if compression == ".bz2" and error.errno is None:
            raise DataError(f"cannot read {path}: its .bz2 compression is damaged: {error}") from None
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _open(path: str, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == ".bz2":
        return cast(IO[bytes], bz2.open(path, "rb"))
    if compression == ".xz":
        return cast(IO[bytes], lzma.open(path, "rb"))
    if compression == ".zst":
        return cast(IO[bytes], zstd.open(path, "rb"))
    return open(path, "rb", buffering=_BUFFER)
