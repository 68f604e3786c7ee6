"""Selection of held-back documents: the user's own files for validation and test, or a share chosen by hash.

The share applies to documents and to bytes. Documents are visited in the order of their hashes until that share of the
hashes is passed. A document that would more than double the share of bytes is skipped. The visit then continues until
half of that share of bytes, or twice that share of documents, is reached. So a few long documents among many short ones
never make up half of the held-back text, or half of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import TooFew
from data_pipeline.plurals import number_of
from data_pipeline.storage.documents import DROPPED, TRAIN, VALIDATION, Gathered, starts_of
from data_pipeline.storage.manifest import Manifest

_HASHES = 1 << 64
# Documents in the order of their hashes: first half of the hash, bytes, unit, index in the unit.
_Visit = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class HeldBack:
    """The number and bytes of documents, and of those among them that are held back."""

    documents: int = 0
    bytes: int = 0
    held_documents: int = 0
    held_bytes: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> HeldBack:
        """Return those of finished data, its test text left aside."""
        documents, size = (
            {split: manifest.total(split, what) for split in ("train", "validation")} for what in ("documents", "bytes")
        )
        return cls(sum(documents.values()), sum(size.values()), documents["validation"], size["validation"])


def choose_by_hash(
    units: Sequence[Gathered], validation_fraction: float, kept: NDArray[np.bool_], before: HeldBack | None = None
) -> None:
    """Choose training or validation for every kept document; drop the others.

    before: the documents to which these are added; the share then applies to all together. The hash of a document's
    bytes decides, so equal documents are always on the same side. Neither side stays empty. Raises DataError if there
    are fewer than two documents.
    """
    adding, before = before is not None, before or HeldBack()
    number = before.documents + int(kept.sum())
    if number < 2:
        raise TooFew(
            f"the input holds {number_of(number, 'different document')} of text; expected at least two, one for "
            "training and one for validation: give more text, or your own validation text with --validation PATH"
        )
    total = before.bytes + sum(int((unit.index["length"][mine] - 1).sum()) for unit, mine in _units(units, kept))
    least, limit = validation_fraction * total / 2, int(validation_fraction * _HASHES)
    most = max(4 * least, min(2 * total / number, total / 2))  # always admits one document of average length
    bound = limit
    while True:
        visit = _visit(units, kept, bound)
        taken = _taken(visit, limit, least, most, max(2 * validation_fraction * number, 1), before)
        held = before.held_documents + taken.sum(), before.held_bytes + visit[1][taken].sum()
        if bound >= _HASHES or (held[0] and held[1] >= least):
            break
        bound = min(8 * bound + 1, _HASHES)
    places = np.flatnonzero(taken)
    if not adding:
        places = places[: number - 1]  # at least one is for training
    for one, (unit, mine) in enumerate(_units(units, kept)):
        choice = np.where(mine, TRAIN, DROPPED).astype(np.uint8)
        choice[visit[3][places[visit[2][places] == one]]] = VALIDATION
        unit.choose(choice)


def choose_all(units: Sequence[Gathered], kept: NDArray[np.bool_], choice: int) -> None:
    """Make the same choice for every kept document; drop the others."""
    for unit, mine in _units(units, kept):
        unit.choose(np.where(mine, choice, DROPPED).astype(np.uint8))


def _units(units: Sequence[Gathered], kept: NDArray[np.bool_]) -> Iterator[tuple[Gathered, NDArray[np.bool_]]]:
    """Yield each unit with its part of `kept`."""
    starts = starts_of(units)
    for unit, start, stop in zip(units, starts[:-1], starts[1:], strict=True):
        yield unit, kept[start:stop]


def _visit(units: Sequence[Gathered], kept: NDArray[np.bool_], bound: int) -> _Visit:
    """Return the kept documents whose hash is below a bound."""
    highs, lows, sizes = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    owners, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, (unit, mine) in enumerate(_units(units, kept)):
        index = unit.index
        below = mine if bound >= _HASHES else mine & (index["high"] < np.uint64(bound))
        here = np.flatnonzero(below)
        highs.append(index["high"][here])
        lows.append(index["low"][here])
        sizes.append(index["length"][here] - 1)
        owners.append(np.full(len(here), number))
        places.append(here)
    high, low = np.concatenate(highs), np.concatenate(lows)
    order = np.lexsort((low, high))
    return high[order], np.concatenate(sizes)[order], np.concatenate(owners)[order], np.concatenate(places)[order]


def _taken(
    visit: _Visit, limit: int, least: float, most: float, documents: float, before: HeldBack
) -> NDArray[np.bool_]:
    """Return a mask of the visited documents to hold back. least, most: bytes. documents: when adding stops."""
    highs, sizes = visit[:2]
    below = len(highs) if limit >= _HASHES else int(np.searchsorted(highs, np.uint64(limit)))
    taken = np.arange(len(sizes)) < below
    if below + before.held_documents and least <= before.held_bytes + sizes[:below].sum() <= most:
        return taken
    taken[:] = False
    number, total = before.held_documents, before.held_bytes
    for place, size in enumerate(sizes.tolist()):
        if place >= below and (number >= documents or (number and total >= least)):
            break
        if total + size <= most:
            taken[place] = True
            number, total = number + 1, total + size
    return taken
