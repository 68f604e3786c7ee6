"""Removal of near-duplicates: MinHash signatures (Broder 1997) and locality-sensitive hashing in bands (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4), over runs of five words as in Lee et al. 2022 (arXiv
2107.06499, section 4.2).

Two documents are near-duplicates if the Jaccard similarity of their sets of runs is 0.8 or more, estimated from 128
numbers, so to within about 0.035. Candidate pairs come from 21 bands of 6 numbers, which finds 99.8 % of those at 0.8
and nearly every one above. The `rensa` library makes the signatures, unit by unit, on any number of workers; the
comparison then runs in one process over all documents. Of documents connected by such pairs, the first stays. This
happens before the split, so no document for validation has a near-duplicate among those for training.

A document takes 680 bytes on disk during the work, and 8 bytes in memory, in addition to a bounded working space.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cleaning.words import WORD, Words, mix, pieces, words_of
from data_pipeline.errors import DataError
from data_pipeline.extras import how_to_install
from data_pipeline.storage.atomic import atomic_file
from data_pipeline.storage.documents import Gathered

THRESHOLD = 0.8

_RUN = 5 * WORD
_NUMBERS = 128  # per signature; with twice as many, the bands would find no more
_BANDS, _ROWS = 21, 6
_SEED = 1
_NOTHING = np.uint32(2**32 - 1)  # every number of a document without words

_SIGNED_AT_A_TIME = 2048  # documents
_SORTED_AT_A_TIME = 1 << 22
_COMPARED_AT_A_TIME = 1 << 15  # pairs
# For documents that share a band but are not similar, this many leaders are tried per group: enough for prose, and a
# bound on the time for a million letters that differ in a name.
_LEADERS = 16


def check_library() -> None:
    """Raise DataError if rensa is not installed."""
    if find_spec("rensa") is None:  # not imported: see `_may_fork` in `workers`
        raise DataError(f"the step 'near-duplicates' needs rensa: {how_to_install('rensa')}")


def sign(gathered: Gathered) -> None:
    """Write the signatures of the documents of a unit, and a hash of each band of each signature; see `Signatures`.

    Takes about 60 MiB of memory, and ten bytes for each word of the longest document.
    """
    signatures, bands = _paths(gathered)
    if bands.exists():
        return
    number = len(gathered.index)
    with atomic_file(bands) as bands_file:
        with atomic_file(signatures) as signatures_file:
            first = 0
            for rows in _signatures(gathered):
                signatures_file.write(rows.tobytes())
                _write_bands(bands_file, rows, first, number)
                first += len(rows)
        assert first == number


def _signatures(gathered: Gathered) -> Iterator[NDArray[np.uint32]]:
    """Yield uint32 [documents, 128] for consecutive groups of documents."""
    index = gathered.index
    for stored, lengths in gathered.documents(0, len(index), np.ones(len(index), np.bool_)):
        pending: list[NDArray[np.uint64]] = []
        waiting = -1  # the long document whose pieces are being collected
        for first, last, text in pieces(stored, lengths):
            if pending and first != waiting:
                yield from _sign([np.concatenate(pending)])
                pending = []
            shingles = _shingles(text, last - first)
            if last - first == 1:  # possibly only a part of it
                pending, waiting = pending + shingles, first
            else:
                yield from _sign(shingles)
        if pending:
            yield from _sign([np.concatenate(pending)])


def _shingles(text: NDArray[np.uint8], number: int) -> list[NDArray[np.uint64]]:
    """Return the hashes of the runs of five words of each document in `text`; of all its words, if it has fewer."""
    words = words_of(text)
    hashes, firsts, _ = words.runs(_RUN)
    runs = np.split(hashes, np.searchsorted(words.documents[firsts], np.arange(1, number)))
    weights = np.bincount(words.documents, words.weights, minlength=number)
    for document in np.flatnonzero((weights > 0) & (weights < _RUN)).tolist():
        start, stop = np.searchsorted(words.documents, [document, document + 1])
        nowhere = np.zeros(stop - start, np.int64)
        whole = Words(words.hashes[start:stop], nowhere, nowhere, nowhere, words.weights[start:stop])
        runs[document], _, _ = whole.runs(int(weights[document]))
    return runs


def _sign(shingles: list[NDArray[np.uint64]]) -> Iterator[NDArray[np.uint32]]:
    from rensa import RMinHash

    for first in range(0, len(shingles), _SIGNED_AT_A_TIME):
        some = shingles[first : first + _SIGNED_AT_A_TIME]
        offsets = np.cumsum([0, *map(len, some)], dtype=np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(some), offsets, _NUMBERS, _SEED)
        yield np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(some), _NUMBERS)


def _write_bands(file: IO[bytes], rows: NDArray[np.uint32], first: int, number: int) -> None:
    """Write the columns from `first` on of the uint64 [21, documents] in the file."""
    for band in range(_BANDS):
        hashes = np.full(len(rows), band, np.uint64)
        for row in range(_ROWS):
            hashes = mix(hashes + rows[:, band * _ROWS + row])
        file.seek(8 * (band * number + first))
        file.write(hashes.tobytes())
    file.seek(0, 2)


def _paths(gathered: Gathered) -> tuple[Path, Path]:
    return gathered.file("signatures"), gathered.file("bands")


class Signatures:
    """The signatures of all units, on disk."""

    def __init__(self, units: list[Gathered]) -> None:
        self._units = units
        self._starts = np.cumsum([0, *(len(unit.index) for unit in units)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def band(self, band: int, unit: int) -> NDArray[np.uint64]:
        """Return the hash of that band of every document of a unit."""
        number = int(self._starts[unit + 1] - self._starts[unit])
        if not number:
            return np.empty(0, np.uint64)
        _, path = _paths(self._units[unit])
        return np.memmap(path, np.uint64, "r", offset=8 * band * number, shape=(number,))

    def rows(self, documents: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return the signatures of some documents, numbered over all units: uint32 [n, 128]."""
        rows = np.empty((len(documents), _NUMBERS), np.uint32)
        owners = np.searchsorted(self._starts, documents, side="right") - 1
        for owner in np.unique(owners).tolist():
            mine = owners == owner
            path, _ = _paths(self._units[owner])
            every = np.memmap(path, np.uint32, "r").reshape(-1, _NUMBERS)
            rows[mine] = every[documents[mine] - self._starts[owner]]
        return rows

    def similarity(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the estimated Jaccard similarity of pairs; 0 if a document has no words."""
        parts = [np.empty(0)]
        for first in range(0, len(left), _COMPARED_AT_A_TIME):
            a, b = (self.rows(side[first : first + _COMPARED_AT_A_TIME]) for side in (left, right))
            parts.append(np.where((a == _NOTHING).all(axis=1), 0.0, (a == b).mean(axis=1)))
        return np.concatenate(parts)


def near_duplicates(units: list[Gathered], kept: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for every document the one kept for it: itself, or the first of those connected to it.

    kept: mask, over all units, of the documents that take part.
    """
    signatures = Signatures(units)
    roots = np.arange(len(signatures), dtype=np.int64)
    passes = 1 << max(0, (len(signatures) // _SORTED_AT_A_TIME).bit_length())
    for band in range(_BANDS):
        for part in range(passes):
            for group in _groups(signatures, units, kept, band, part, passes):
                _join(group, signatures, roots)
    return _resolved(roots, np.arange(len(roots)))


def _groups(
    signatures: Signatures, units: list[Gathered], kept: NDArray[np.bool_], band: int, part: int, passes: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield documents that share the hash of a band, ascending within groups, and the number of each one's group."""
    hashes, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    start = 0
    for unit in range(len(units)):
        every = signatures.band(band, unit)
        places = np.flatnonzero(kept[start : start + len(every)] & ((every & np.uint64(passes - 1)) == part))
        hashes.append(every[places])
        numbers.append(places + start)
        start += len(every)
    values, documents = np.concatenate(hashes), np.concatenate(numbers)
    order = np.argsort(values, kind="stable")
    values, documents = values[order], documents[order]
    new = np.ones(len(values), np.bool_)
    new[1:] = values[1:] != values[:-1]
    alone = new.copy()
    alone[:-1] &= new[1:]
    yield documents[~alone], np.cumsum(new)[~alone]


def _join(group: tuple[NDArray[np.int64], NDArray[np.int64]], signatures: Signatures, roots: NDArray[np.int64]) -> None:
    """Compare the documents of each group with its first one, those that differ with the first of them, and so on."""
    documents, groups = group
    for _ in range(_LEADERS):
        if not len(documents):
            return
        new = np.append(True, groups[1:] != groups[:-1])
        leaders = documents[np.flatnonzero(new)][np.cumsum(new) - 1]
        others = ~new
        left, right = documents[others], leaders[others]
        joined = _resolved(roots, left) == _resolved(roots, right)
        open_pairs = np.flatnonzero(~joined)
        alike = open_pairs[signatures.similarity(left[open_pairs], right[open_pairs]) >= THRESHOLD]
        for a, b in zip(left[alike].tolist(), right[alike].tolist(), strict=True):
            _unite(roots, a, b)
        joined[alike] = True
        rest = np.flatnonzero(others)[~joined]
        documents, groups = documents[rest], groups[rest]


def _unite(roots: NDArray[np.int64], a: int, b: int) -> None:
    a, b = _root(roots, a), _root(roots, b)
    roots[max(a, b)] = min(a, b)


def _root(roots: NDArray[np.int64], document: int) -> int:
    while (above := int(roots[document])) != document:
        roots[document] = roots[above]
        document = above
    return document


def _resolved(roots: NDArray[np.int64], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the root of each document."""
    found = roots[documents]
    while not np.array_equal(above := roots[found], found):
        found = above
    roots[documents] = found
    return found
