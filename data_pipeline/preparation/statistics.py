"""Statistics and samples of the data, for the manifest and the report.

All of them are computed from the chosen documents. Lengths are counted exactly; measures of the text come from a
sample: for each source, documents chosen evenly by their hash, 256 KiB at most.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.sources.conversations import END_OF_STORED_SEGMENT
from data_pipeline.storage.cleaning_record import excerpt
from data_pipeline.storage.documents import CHOICES, DROPPED, Gathered
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

SAMPLE_BYTES = 1 << 18  # of each source
_EXCERPTS = 3  # of each source
_EXCERPT_CHARACTERS = 500


def describe_source(units: Sequence[Gathered], tokenizer_dir: Path, keep_ids: bool) -> dict[str, Any]:
    """Return the statistics of one source: documents and bytes by split, histograms of lengths, measures of its sample.

    lengths: by split, the number of documents of 1, 2 to 3, 4 to 7, … bytes. sample: its size, bytes per id
    (end_of_text counted), the factors by which gzip and xz compress it, and byte_counts, the count of each of the 256
    byte values. keep_ids: see `indexed`; lengths are then those of the ids as stored, and the bytes of text are not
    counted.
    """
    splits: dict[str, Any] = {}
    for split, choice in CHOICES.items():
        classes, size = np.zeros(64, np.int64), 0
        for unit in units:  # one by one, as the lengths of all documents may not fit in memory
            lengths = unit.index["length"][unit.choice == choice] - 1
            classes += np.bincount(np.frexp(lengths)[1] - 1, minlength=64)
            size += int(lengths.sum())
        splits[split] = {
            "documents": int(classes.sum()),
            "bytes": None if keep_ids else size,
            "lengths": np.trim_zeros(classes, "b").tolist(),
        }
    tokenizer = load_tokenizer(tokenizer_dir)
    documents = [_text(document, tokenizer, keep_ids) for document in _sample(units)]
    excerpts = [
        excerpt(_text(document, tokenizer, keep_ids), _EXCERPT_CHARACTERS)
        for unit, place in _lowest(units, _EXCERPTS)
        for document in unit.pick([place])
    ]
    return {**splits, "sample": _measures(documents, tokenizer), "excerpts": excerpts}


def _measures(documents: list[bytes], tokenizer: Tokenizer) -> dict[str, Any]:
    data = b"".join(documents)
    ids = sum(len(tokenizer.encode(document.decode("utf-8", errors="replace"))) + 1 for document in documents)
    if not data:
        return {"documents": len(documents), "bytes": 0}
    return {
        "documents": len(documents),
        "bytes": len(data),
        "bytes_per_id": round(len(data) / ids, 4),
        "gzip_ratio": round(len(data) / len(gzip.compress(data, 6, mtime=0)), 4),
        "xz_ratio": round(len(data) / len(lzma.compress(data, preset=6)), 4),
        "byte_counts": np.bincount(np.frombuffer(data, np.uint8), minlength=256).tolist(),
    }


def _sample(units: Sequence[Gathered]) -> Iterator[bytes]:
    """Yield documents chosen evenly by their hash; 256 KiB of them, of which the last one may be cut."""
    total = sum(int(unit.index["length"][unit.choice != DROPPED].sum()) for unit in units)
    limit = np.uint64(min(SAMPLE_BYTES / max(total, 1), 1) * (2**64 - 2048))
    chosen = [
        (unit, np.flatnonzero((unit.index["low"] <= limit) & (unit.choice != DROPPED)).tolist()) for unit in units
    ]
    if not any(places for _, places in chosen):
        chosen = [(unit, [place]) for unit, place in _lowest(units, 1)]
    left = SAMPLE_BYTES
    for unit, places in chosen:
        for document in unit.pick(places):
            if left <= 0:
                return
            yield document[:left]
            left -= len(document)


def _lowest(units: Sequence[Gathered], number: int) -> list[tuple[Gathered, int]]:
    """Return the documents with the lowest hashes."""
    found: list[tuple[int, Gathered, int]] = []
    for unit in units:
        places = np.flatnonzero(unit.choice != DROPPED)
        low: NDArray[np.uint64] = unit.index["low"][places]
        first = np.argpartition(low, number)[:number] if len(low) > number else np.arange(len(low))
        found += [(int(low[one]), unit, int(places[one])) for one in first.tolist()]
    return [(unit, place) for _, unit, place in sorted(found, key=lambda one: one[0])[:number]]


def _text(document: bytes, tokenizer: Tokenizer, keep_ids: bool) -> bytes:
    if not keep_ids:
        return document.replace(bytes([END_OF_STORED_SEGMENT]), b"")
    whole = len(document) - len(document) % tokenizer.dtype.itemsize  # the sample's last document may be cut
    return tokenizer.decode_bytes(np.frombuffer(document[:whole], tokenizer.dtype))
