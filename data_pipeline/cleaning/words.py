"""Words and runs of words as 64-bit hashes, for many documents at a time, in numpy.

A word is a run of letters and digits, without regard to the case of a to z; punctuation and spaces only separate. In
Chinese, Japanese and Korean, which put no spaces between words, every character is one. So two texts that differ in
layout, punctuation or capitals have the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizers.base import END_OF_STORED_DOCUMENT

PIECE = 1 << 20  # bytes looked at together: bounds the memory, some 60 bytes for each
OVERLAP = 1 << 12  # bytes that the pieces of a long document share, so that no run of words is cut

_ODD = 0x9E3779B97F4A7C15  # any odd number has an inverse modulo 2**64
_POWERS: NDArray[np.uint64] = np.empty(0, np.uint64)
_INVERSES: NDArray[np.uint64] = np.empty(0, np.uint64)


def _letters() -> NDArray[np.uint8]:
    """Byte → what it counts as: lower case, and 0 for what separates words."""
    table = np.zeros(256, np.uint8)
    for byte in b"0123456789abcdefghijklmnopqrstuvwxyz":
        table[byte] = table[ord(chr(byte).upper())] = byte
    table[0x80:END_OF_STORED_DOCUMENT] = np.arange(0x80, END_OF_STORED_DOCUMENT)
    return table


_LETTERS = _letters()


@dataclass(frozen=True)
class Words:
    """The words of some text in a row."""

    hashes: NDArray[np.uint64]
    starts: NDArray[np.int64]  # bytes [start, stop) of the text
    stops: NDArray[np.int64]
    documents: NDArray[np.int64]  # to which document of the text each belongs

    def runs(self, length: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The hash of every `length` words in a row within a document, and which word each run begins with."""
        number = max(len(self.hashes) - length + 1, 0)
        firsts = np.flatnonzero(self.documents[:number] == self.documents[length - 1 :])
        hashes = np.zeros(number, np.uint64)
        for place in range(length):
            hashes = hashes * np.uint64(_ODD) + self.hashes[place : place + number]
        return mix(hashes[firsts]), firsts


def mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all: the last step of SplitMix64 (Steele et al. 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def words_of(text: NDArray[np.uint8]) -> Words:
    """The words of stored documents: UTF-8, one 0xFF after each."""
    letters = _LETTERS[text]
    # Punctuation beyond ASCII: U+0080 to U+00BF (C2), U+2000 to U+207F (E2 80, E2 81), U+3000 to U+303F (E3 80).
    letters[_characters(text, (text == 0xC2), 2)] = 0
    second = np.append(text[1:], np.uint8(0))
    letters[_characters(text, (text == 0xE2) & (second <= 0x81), 3)] = 0
    letters[_characters(text, (text == 0xE3) & (second == 0x80), 3)] = 0
    inside = letters != 0
    # U+3040 to U+D7FF: kana, Han, Hangul.
    alone = (text >= 0xE3) & (text <= 0xED) & inside
    begins = inside.copy()
    begins[1:] &= ~inside[:-1] | alone[1:]
    begins[3:] |= alone[:-3] & inside[3:]
    starts = np.flatnonzero(begins)
    goes_on = inside & ~begins
    stops = np.flatnonzero(inside & ~np.append(goes_on[1:], False)) + 1

    powers, inverses = _powers(len(text))
    sums = np.zeros(len(text) + 1, np.uint64)
    np.cumsum(letters * powers[: len(text)], out=sums[1:])
    hashes = mix((sums[stops] - sums[starts]) * inverses[starts])
    documents = np.cumsum(text == END_OF_STORED_DOCUMENT)[starts] if len(starts) else np.empty(0, np.int64)
    return Words(hashes, starts, stops, documents)


def pieces(stored: NDArray[np.uint8], lengths: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Cut stored documents for `words_of`: (first document, last + 1, text).

    Many whole documents at a time; a long one in several pieces, each of which repeats the end of the one before.
    """
    stops = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        start = int(stops[first] - lengths[first])
        last = max(int(np.searchsorted(stops, start + PIECE, side="right")), first + 1)
        stop = int(stops[last - 1])
        if stop - start <= PIECE:
            yield first, last, stored[start:stop]
        else:
            for begin in range(start, stop, PIECE - OVERLAP):
                yield first, last, stored[begin : min(begin + PIECE, stop)]
                if begin + PIECE >= stop:
                    break
        first = last


def _characters(text: NDArray[np.uint8], leads: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
    """All bytes of the characters whose first bytes are marked."""
    marked = leads.copy()
    for offset in range(1, size):
        marked[offset:] |= leads[:-offset]
    return marked


def _powers(length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """_ODD to the power 0, 1, …, and the inverses, modulo 2**64."""
    global _POWERS, _INVERSES
    if len(_POWERS) < length:
        size = max(length, PIECE)
        _POWERS, _INVERSES = np.ones((2, size), np.uint64)
        _POWERS[1:], _INVERSES[1:] = _ODD, pow(_ODD, -1, 2**64)
        np.cumprod(_POWERS, out=_POWERS)
        np.cumprod(_INVERSES, out=_INVERSES)
    return _POWERS, _INVERSES
