"""Documents that equal another one, found by their hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.documents import Gathered, starts_of

_SORTED_AT_A_TIME = 1 << 22  # documents; bounds the memory of the search for duplicates


def drop_duplicates(units: Sequence[Gathered], kept: NDArray[np.bool_]) -> None:
    """Clear `kept`, which covers all units, for every document that equals an earlier one.

    Sorts in passes by the leading bits of the hash; each pass holds all documents that could be equal.
    """
    starts = starts_of(units)
    passes = 1 << max(0, (int(starts[-1]) // _SORTED_AT_A_TIME).bit_length())
    for bucket in range(passes):
        kept[_later_duplicates(units, starts, bucket, passes)] = False


def copies_of(held: Sequence[Gathered], units: Sequence[Gathered]) -> NDArray[np.bool_]:
    """Return a mask of the documents of all `units`: true for those equal to a held-back one."""
    high = np.concatenate([np.empty(0, np.uint64), *(unit.index["high"] for unit in held)])
    low = np.concatenate([np.empty(0, np.uint64), *(unit.index["low"] for unit in held)])
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    found = [np.zeros(0, np.bool_)]
    for unit in units:
        index = unit.index
        first, last = np.searchsorted(high, index["high"], "left"), np.searchsorted(high, index["high"], "right")
        equal = first < last  # rarely true by chance
        for place in np.flatnonzero(equal).tolist():
            equal[place] = index["low"][place] in low[first[place] : last[place]]
        found.append(equal)
    return np.concatenate(found)


def _later_duplicates(
    units: Sequence[Gathered], starts: NDArray[np.int64], bucket: int, passes: int
) -> NDArray[np.int64]:
    """Return the documents, numbered over all units, that equal an earlier one, within one bucket of hashes."""
    high, low, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number, unit in enumerate(units):
        index = unit.index
        places = np.flatnonzero((index["high"] & np.uint64(passes - 1)) == bucket)
        high.append(index["high"][places])
        low.append(index["low"][places])
        numbers.append(places + starts[number])
    highs, lows, all_numbers = np.concatenate(high), np.concatenate(low), np.concatenate(numbers)
    order = np.lexsort((lows, highs))  # stable: equal documents keep their order, and the first of them stays
    equal = (highs[order][1:] == highs[order][:-1]) & (lows[order][1:] == lows[order][:-1])
    return all_numbers[order[1:][equal]]
