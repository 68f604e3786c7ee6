"""Files of ids made by Megatron-DeepSpeed, GPT-NeoX or DeepSpeed, as a source: PREFIX.bin with PREFIX.idx, "MMIDIDX".

They do not name their tokenizer, so the user does. By default the ids are decoded to text, which is prepared like all
text. If the tokenizer stays the same, the ids are kept: a document is then the bytes of its ids, and later steps
choose, deduplicate and divide documents without decoding them.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.sources.files import state_of
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.text_files import clean
from data_pipeline.storage.atomic import sha256_file
from data_pipeline.storage.shards import Shard, bin_path, idx_path
from data_pipeline.tokenizers import Tokenizer, build_tokenizer
from data_pipeline.tokenizers.base import checked_ids
from data_pipeline.tokenizers.huggingface import read_tokenizer, size_of, tokenizer_file

_DOCUMENTS = 1 << 14  # in one unit
_FORMS = "byte, sentencepiece:FILE (a .model file) or hf:DIR (a folder with tokenizer.json)"


def indexed_prefix(path: Path) -> Path | None:
    """Return PREFIX if `path` is PREFIX, PREFIX.bin or PREFIX.idx and both files exist."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix if os.path.isfile(bin_path(prefix)) and os.path.isfile(idx_path(prefix)) else None


class IndexedFiles:
    """Indexed files, in a fixed order."""

    kind = "indexed files"

    def __init__(
        self, name: str, prefixes: Sequence[Path], tokenizer: str | None, keep_ids: bool, on_error: str
    ) -> None:
        """tokenizer: the one that made the ids. Raises DataError if it is not named, or the files are not in this
        format.
        """
        self.name = name
        self.problems = Problems()
        self._prefixes = prefixes
        if tokenizer is None:
            raise DataError(f"{name} holds ids: name the tokenizer that made them with --input-tokenizer: {_FORMS}")
        self._reading = IndexedReading(tokenizer, keep_ids, on_error)
        _decoder(tokenizer)
        for prefix in prefixes:
            _documents(prefix)

    def describe(self) -> dict[str, Any]:
        status = [(path, os.stat(path)) for path, _ in self.contents()]
        return {
            "kind": self.kind,
            "path": str(Path(self.name).resolve()),
            "state": state_of([(path, one.st_size, one.st_mtime_ns) for path, one in status]),
            "tokenizer": self._reading.tokenizer,
            "tokenizer_sha256": sha256_file(file) if (file := _file_of(self._reading.tokenizer)) else None,
            "ids": "kept" if self._reading.keep_ids else "decoded",
        }

    def contents(self) -> list[tuple[str, int]]:
        paths = [path for prefix in self._prefixes for path in (bin_path(prefix), idx_path(prefix))]
        return [(str(path), path.stat().st_size) for path in paths]

    def kind_of(self, path: str) -> str:
        return os.path.splitext(path)[1]

    def units(self, source: int) -> list[IndexedUnit]:
        units = []
        for prefix in self._prefixes:
            shard, documents = _documents(prefix)
            start = 0
            for first in range(0, len(documents) - 1, _DOCUMENTS):
                last = min(first + _DOCUMENTS, len(documents) - 1)
                ids = int(shard.sizes[documents[first] : documents[last]].sum(dtype=np.int64))
                size = ids * shard.dtype.itemsize
                units.append(IndexedUnit(source, size, str(prefix), first, last, start, self._reading))
                start += ids
        return units


@dataclass(frozen=True)
class IndexedReading:
    """Reading options shared by all files of a source."""

    tokenizer: str
    keep_ids: bool
    on_error: str


@dataclass(frozen=True)
class IndexedUnit:
    """Documents [first, last) of an indexed file; `start`: the position of the first one's first id."""

    source: int
    size: int
    prefix: str = field(repr=False)
    first: int
    last: int
    start: int
    reading: IndexedReading

    def read(self, problems: Problems) -> Iterator[bytes]:
        shard, documents = _documents(Path(self.prefix))
        vocab_size, text_of = _decoder(self.reading.tokenizer)
        keeper = build_tokenizer(self.reading.tokenizer) if self.reading.keep_ids else None
        stop = self.start
        for document in range(self.first, self.last):
            sizes = shard.sizes[documents[document] : documents[document + 1]]
            start, stop = stop, stop + int(sizes.sum(dtype=np.int64))
            try:
                ids = checked_ids(shard.ids[start:stop], vocab_size)
            except DataError as error:
                message = (
                    f"{bin_path(self.prefix)}: document {document}: {error}; is {self.reading.tokenizer} its tokenizer?"
                )
                if self.reading.on_error != "skip":
                    raise DataError(message) from None
                problems.count("broken_documents", 1, message)
                continue
            yield clean(text_of(ids), problems) if keeper is None else _kept(ids, keeper)


def _kept(ids: NDArray[np.int64], tokenizer: Tokenizer) -> bytes:
    """Return the ids, ending with end_of_text, as bytes of their type on disk; b"" if there is no text."""
    text = ids[:-1] if ids.size and ids[-1] == tokenizer.end_of_text_id else ids
    return np.append(text, tokenizer.end_of_text_id).astype(tokenizer.dtype).tobytes() if text.size else b""


def ids_of_kept(
    stored: NDArray[np.uint8], lengths: NDArray[np.int64], dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the ids of documents that were stored with their ids kept, and the number of ids of each.

    `stored`, `lengths`: as for `Tokenizer.encode_documents`, one 0xFF after each document.
    """
    return np.delete(stored, np.cumsum(lengths) - 1).view(dtype), (lengths - 1) // dtype.itemsize


def _documents(prefix: Path) -> tuple[Shard, NDArray[np.int64]]:
    """Return an indexed file, and the first sequence of each of its documents followed by the number of sequences.

    If the index lists no documents, each sequence is one.
    """
    shard = Shard(prefix)
    starts = shard.documents
    if len(starts) <= 1:
        starts = np.arange(len(shard.sizes) + 1, dtype=np.int64)
    if starts[0] != 0 or starts[-1] != len(shard.sizes) or (np.diff(starts) < 0).any() or (shard.sizes < 0).any():
        raise DataError(f"{idx_path(prefix)} is damaged: its documents do not cover its sequences in order")
    return shard, starts


def _file_of(spec: str) -> Path | None:
    """Return the file that defines a tokenizer; None if it needs none."""
    kind, _, place = spec.partition(":")
    return tokenizer_file(place) if kind == "hf" else Path(place) if place else None


@functools.lru_cache(maxsize=2)
def _decoder(spec: str) -> tuple[int, Callable[[NDArray[np.int64]], bytes | str]]:
    """Return the vocabulary size of a tokenizer, and a function that decodes its ids without special ones."""
    kind, _, place = spec.partition(":")
    if spec == "byte":
        tokenizer = build_tokenizer("byte")
        return tokenizer.vocab_size, tokenizer.decode_bytes
    if kind == "sentencepiece" and place:
        from sentencepiece import SentencePieceProcessor

        if not os.path.isfile(place):
            raise DataError(f"--input-tokenizer {spec}: {place} is not a file; expected a .model file of sentencepiece")
        try:
            processor = SentencePieceProcessor(model_file=place)
        except RuntimeError as error:
            raise DataError(f"--input-tokenizer {spec}: {place} is not a sentencepiece model: {error}") from error
        return processor.vocab_size(), lambda ids: processor.decode(ids.tolist())
    if kind == "hf" and place:
        library = read_tokenizer(place)
        return size_of(library), lambda ids: library.decode(ids.tolist(), skip_special_tokens=True)
    place = place or ("FILE.model" if spec.lower().startswith("s") else "DIR")
    near = difflib.get_close_matches(kind.lower(), ("byte", "sentencepiece", "hf"), n=1)
    form = "byte" if near == ["byte"] else f"{near[0]}:{place}" if near else ""
    raise DataError(f"--input-tokenizer {spec!r} is unknown: expected {_FORMS}{f'; nearest: {form}' if form else ''}")
