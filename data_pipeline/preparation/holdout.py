"""Which documents are held back: the user's own files for validation and for a test, or a share chosen by hash.

The share holds for documents and for bytes. Documents are visited in the order of their hashes until that share of the
hashes is passed. One that would more than double the share of bytes is passed over, and the visit goes on until half
of that share is reached, or twice that of the documents. So a few long documents among many short ones are never half
of what is held back, or half of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import TooFew
from data_pipeline.preparation.gathering import DROPPED, TRAIN, VALIDATION, Gathered, starts_of

_HASHES = 1 << 64
# Of documents in the order of their hashes: the hash's first half, bytes, unit, place in the unit.
_Visit = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Share:
    """Documents and their bytes, and those of them that are held back."""

    documents: int = 0
    bytes: int = 0
    held_documents: int = 0
    held_bytes: int = 0


def choose_by_hash(
    units: Sequence[Gathered], validation_fraction: float, kept: NDArray[np.bool_], before: Share | None = None
) -> None:
    """Decide for every document that is kept whether it is for training or for validation; drop the others.

    before: the documents that these are added to; the share is then that of all together. The hash of a document's
    bytes decides, so equal documents never stand on both sides. Neither side stays empty. Raises DataError if there are
    fewer than two documents.
    """
    adding, before = before is not None, before or Share()
    number = before.documents + int(kept.sum())
    if number < 2:
        raise TooFew(
            f"different documents of text in the input: {number}; expected at least two, one to train on, one to "
            "validate with: give more text, or text of its own with --validation PATH"
        )
    total = before.bytes + sum(int((unit.index["length"][mine] - 1).sum()) for unit, mine in _units(units, kept))
    least, limit = validation_fraction * total / 2, int(validation_fraction * _HASHES)
    most = max(4 * least, min(2 * total / number, total / 2))  # one document of usual length is never too much
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
        places = places[: number - 1]  # one at least is for training
    for one, (unit, mine) in enumerate(_units(units, kept)):
        choice = np.where(mine, TRAIN, DROPPED).astype(np.uint8)
        choice[visit[3][places[visit[2][places] == one]]] = VALIDATION
        unit.choose(choice)


def choose_all(units: Sequence[Gathered], kept: NDArray[np.bool_], choice: int) -> None:
    """Choose the same for every document that is kept; drop the others."""
    for unit, mine in _units(units, kept):
        unit.choose(np.where(mine, choice, DROPPED).astype(np.uint8))


def copies_of(held: Sequence[Gathered], units: Sequence[Gathered]) -> NDArray[np.bool_]:
    """Which documents of `units`, counted over all of them, equal one that is held back."""
    high = np.concatenate([np.empty(0, np.uint64), *(unit.index["high"] for unit in held)])
    low = np.concatenate([np.empty(0, np.uint64), *(unit.index["low"] for unit in held)])
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    found = [np.zeros(0, np.bool_)]
    for unit in units:
        index = unit.index
        first, last = np.searchsorted(high, index["high"], "left"), np.searchsorted(high, index["high"], "right")
        equal = first < last  # hardly ever by chance
        for place in np.flatnonzero(equal).tolist():
            equal[place] = index["low"][place] in low[first[place] : last[place]]
        found.append(equal)
    return np.concatenate(found)


def _units(units: Sequence[Gathered], kept: NDArray[np.bool_]) -> Iterator[tuple[Gathered, NDArray[np.bool_]]]:
    """Each unit with its part of `kept`."""
    starts = starts_of(list(units))
    for unit, start, stop in zip(units, starts[:-1], starts[1:], strict=True):
        yield unit, kept[start:stop]


def _visit(units: Sequence[Gathered], kept: NDArray[np.bool_], bound: int) -> _Visit:
    """The documents that are kept and whose hash is below a bound."""
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


def _taken(visit: _Visit, limit: int, least: float, most: float, documents: float, before: Share) -> NDArray[np.bool_]:
    """Which documents of a visit are held back. least, most: bytes. documents: after which no further one is added."""
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
