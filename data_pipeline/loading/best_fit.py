"""Best-fit-decreasing packing of documents into windows, in memory independent of their number.

Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024 (arXiv 2404.10830), section 3: place the longest
piece first, each in the fullest window that still has room. Pieces of one size are interchangeable, so only the number
of each size is packed. Windows with equal contents are described once, and `Slots` maps the j-th piece of a size to its
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Alike(NamedTuple):
    """`number` windows that hold the same sizes. contents: (size, how many), largest size first."""

    number: int
    contents: tuple[tuple[int, int], ...]


def best_fit_decreasing(counts: Sequence[int], capacity: int) -> list[Alike]:
    """Pack counts[s] pieces of each size s in 1 … capacity into windows of that capacity."""
    open_windows: dict[int, list[Alike]] = {}  # by the remaining room
    rooms = 0  # bit r is set while windows with room r > 0 exist, so the smallest that fits is found at once

    def put(room: int, windows: Alike) -> None:
        nonlocal rooms
        open_windows.setdefault(room, []).append(windows)
        rooms |= (1 << room) & ~1

    for size in range(capacity, 0, -1):
        left = counts[size]
        while left:
            fitting = rooms >> size
            if not fitting:
                # A window takes as many as fit, being the fullest with room for the next; then a new one is opened.
                each = capacity // size
                if left // each:
                    put(capacity - each * size, Alike(left // each, ((size, each),)))
                if left % each:
                    put(capacity - left % each * size, Alike(1, ((size, left % each),)))
                break
            room = size + (fitting & -fitting).bit_length() - 1
            windows = open_windows[room].pop()
            if not open_windows[room]:
                rooms &= ~(1 << room)
            each = room // size
            filled = min(windows.number, left // each)
            left -= filled * each
            if filled:
                put(room - each * size, Alike(filled, (*windows.contents, (size, each))))
            rest = windows.number - filled
            if rest and left:  # fewer than `each`: they share a window
                put(room - left * size, Alike(1, (*windows.contents, (size, left))))
                rest, left = rest - 1, 0
            if rest:
                put(room, Alike(rest, windows.contents))
    return [windows for room in sorted(open_windows) for windows in open_windows[room]]


@dataclass(frozen=True)
class Slots:
    """The places of the pieces: windows, and the pieces in them, numbered consecutively from 0."""

    num_windows: int
    num_pieces: int
    _begin: NDArray[np.int64]  # per run of slots: its first slot, counted over all sizes
    _window: NDArray[np.int64]  # its first window
    _piece: NDArray[np.int64]  # its first piece
    _each: NDArray[np.int64]  # slots in a window
    _pieces_each: NDArray[np.int64]  # all pieces in a window
    _size_begin: NDArray[np.int64]  # [capacity + 1]: the first slot of each size

    @classmethod
    def of(cls, packed: Sequence[Alike], counts: Sequence[int]) -> Slots:
        runs = []
        window = piece = 0
        for count, contents in packed:
            pieces_each = sum(each for _, each in contents)
            offset = 0
            for size, each in contents:
                runs.append((size, window, piece + offset, each, pieces_each, count * each))
                offset += each
            window += count
            piece += count * pieces_each
        runs.sort()
        columns = np.array(runs, dtype=np.int64).reshape(-1, 6).T
        begin = np.cumsum(columns[5]) - columns[5]
        size_begin = np.cumsum([0, *counts])[:-1]
        return cls(window, piece, begin, columns[1], columns[2], columns[3], columns[4], size_begin)

    def place(self, sizes: NDArray[np.int64], ranks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (windows, pieces) of the pieces whose rank among those of their size is given. Ranks count from 0."""
        slots: NDArray[np.int64] = self._size_begin[sizes] + ranks
        run = np.searchsorted(self._begin, slots, side="right") - 1
        row = (slots - self._begin[run]) // self._each[run]
        column = (slots - self._begin[run]) % self._each[run]
        return self._window[run] + row, self._piece[run] + row * self._pieces_each[run] + column

    def firsts(self, packed: Sequence[Alike]) -> NDArray[np.int64]:
        """Return the first piece of each window, followed by the number of pieces."""
        counts = [windows.number for windows in packed]
        pieces = [sum(each for _, each in windows.contents) for windows in packed]
        return np.cumsum(np.concatenate([[0], np.repeat(np.array(pieces, np.int64), counts)]))


class RunningNumbers:
    """Running numbers 0, 1, 2 … for things of each kind, in order of appearance, block by block."""

    def __init__(self, kinds: int) -> None:
        self._seen = np.zeros(kinds, dtype=np.int64)

    def __call__(self, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
        order = np.argsort(kinds, kind="stable")
        ordered = kinds[order]
        first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, np.bool_)
        starts = np.flatnonzero(first)
        lengths = np.diff(np.append(starts, len(ordered)))
        ranks = np.empty(len(kinds), dtype=np.int64)
        ranks[order] = np.arange(len(ordered)) - np.repeat(starts, lengths) + self._seen[ordered]
        self._seen[ordered[starts]] += lengths
        return ranks
