"""Words and runs of words as 64-bit hashes, for many documents at a time, in numpy.

A word is a run of letters and digits. Before comparison, characters are folded: compatibility forms (full-width
letters, ligatures), case in every script, accents and other combining marks; invisible characters (zero-width spaces,
soft hyphens, direction marks) are dropped. Everything else separates words: spaces, punctuation, symbols. So texts that
differ only in layout, punctuation, capitals, accents or Unicode normalisation have the same words.

Some scripts put no spaces between words. There every character, or syllable of Hangul, is a unit, and a number of units
weighs as much as a word: one of Han, two of kana or Hangul, three letters of Thai, Lao, Khmer or Burmese. Korean has
spaces, but writers place them differently.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizers.base import END_OF_STORED_DOCUMENT

VERSION = 2  # increased when the same text begins to give other words
WORD = 6  # the weight of a word; divisible by 2 and 3

PIECE = 1 << 19  # bytes processed together; bounds the memory, about 100 bytes for each
OVERLAP = 1 << 12  # bytes that the pieces of a long document share, so that no run of words is cut

_ODD = 0x9E3779B97F4A7C15  # any odd number has an inverse modulo 2**64
_POWERS: NDArray[np.uint64] = np.empty(0, np.uint64)
_INVERSES: NDArray[np.uint64] = np.empty(0, np.uint64)

# First and last code point of characters that are units, after folding, and the weight of each.
_UNITS = (
    *((0x3005, 0x3007, WORD), (0x3400, 0x4DBF, WORD), (0x4E00, 0x9FFF, WORD), (0x20000, 0x3FFFF, WORD)),  # Han
    *((0x3041, 0x30FF, WORD // 2), (0x31F0, 0x31FF, WORD // 2), (0x1B000, 0x1B16F, WORD // 2)),  # kana
    *((0x1100, 0x115F, WORD // 2), (0xA960, 0xA97F, WORD // 2)),  # initial consonants of Hangul
    *((0x0E00, 0x0EFF, WORD // 3), (0x1780, 0x17FF, WORD // 3)),  # Thai, Lao; Khmer
    *((0x1000, 0x109F, WORD // 3), (0xA9E0, 0xA9FF, WORD // 3), (0xAA60, 0xAA7F, WORD // 3)),  # Burmese
)
_SYLLABLE_RESTS = ((0x1160, 0x11FF), (0xD7B0, 0xD7FF))  # vowels and last consonants of Hangul

# Letters in Unicode but not to a reader: the Arabic stretcher, fillers of Hangul, modifier apostrophes.
_INVISIBLE = frozenset("\u0640\u115f\u1160\u3164\uffa0")
_APOSTROPHES = frozenset(map(chr, range(0x2B9, 0x2C0)))
_WHITE_CONTROLS = frozenset("\t\n\x0b\x0c\r\x85")
_DOTLESS_I = "\u0131"  # lower case of I in Turkish; i elsewhere

_SEPARATOR, _LETTER, _UNIT, _REST = range(4)  # kinds of folded characters
_END = 0x110000  # stands for END_OF_STORED_DOCUMENT among code points


@dataclass(frozen=True)
class Words:
    """The words of some text in order."""

    hashes: NDArray[np.uint64]
    starts: NDArray[np.int64]  # bytes [start, stop) of the text
    stops: NDArray[np.int64]
    documents: NDArray[np.int64]  # the document of each in the text
    weights: NDArray[np.int64]  # WORD, or less for a unit of a script without spaces

    def runs(self, weight: int) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """Find the shortest run from each word on, within its document, that weighs at least `weight`.

        Return the hashes of the runs, and the first and the last word of each.
        """
        number = len(self.hashes)
        if not number:
            return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
        if self.weights.min() == WORD:  # same result as below, but faster
            lasts = np.arange(number) + (-(-weight // WORD) - 1)
        else:
            before = np.append(0, np.cumsum(self.weights))
            lasts = np.searchsorted(before, before[:-1] + weight) - 1
        firsts = np.arange(np.searchsorted(lasts, number))
        within = np.flatnonzero(self.documents[firsts] == self.documents[lasts[firsts]])
        firsts, lasts = within, lasts[within]
        return _spans(self.hashes, firsts, lasts + 1), firsts, lasts


def mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all: the last step of SplitMix64 (Steele et al. 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def words_of(text: NDArray[np.uint8]) -> Words:
    """Return the words of stored documents: UTF-8, one 0xFF after each."""
    entries, begins, ends = _folded(*_code_points(text), len(text))
    letters, kinds = _FOLDING.codes[entries], _FOLDING.kinds[entries]
    inside = kinds != _SEPARATOR
    # A unit starts a new word, and so does a letter after one; the rest of a syllable does not.
    new = inside & (kinds == _UNIT)
    new[:1] |= inside[:1]
    new[1:] |= inside[1:] & ((kinds[:-1] == _SEPARATOR) | ((kinds[1:] == _LETTER) & (kinds[:-1] >= _UNIT)))
    starts = np.flatnonzero(new)
    stops = np.flatnonzero(inside & ~np.append(inside[1:] & ~new[1:], False)) + 1
    places = begins[starts]
    documents = np.searchsorted(np.flatnonzero(text == END_OF_STORED_DOCUMENT), places)
    weights = _FOLDING.weights[entries[starts]]
    return Words(_spans(letters, starts, stops), places, ends[stops - 1], documents, weights)


def count(text: str) -> int:
    """Return the number of words of a text, for scripts with and without spaces."""
    data = text.encode("utf-8", errors="replace")
    return int(words_of(np.frombuffer(data, np.uint8)).weights.sum()) // WORD


def pieces(stored: NDArray[np.uint8], lengths: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Cut stored documents for `words_of`: (first document, last + 1, text).

    A piece holds many whole documents; a long document has several pieces, each repeating the end of the previous one.
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


def _code_points(text: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the characters of UTF-8, 0xFF as _END, and the byte position of each. A cut character may give another."""
    places = np.flatnonzero((text & 0xC0) != 0x80)
    leads = text[places]
    codes = leads.astype(np.uint32)
    padded = np.append(text, np.zeros(3, np.uint8))
    for size, least, bits in ((2, 0xC0, 0x1F), (3, 0xE0, 0x0F), (4, 0xF0, 0x07)):
        several = np.flatnonzero((leads >= least) & (leads < END_OF_STORED_DOCUMENT))
        if len(several):
            found = leads[several].astype(np.uint32) & bits
            for offset in range(1, size):
                found = (found << 6) | (padded[places[several] + offset] & 0x3F)
            codes[several] = found
    codes[leads == END_OF_STORED_DOCUMENT] = _END
    return np.minimum(codes, _END), places


class _Folding:
    """A table of the folded form of each character, filled as characters occur."""

    def __init__(self) -> None:
        self._known = np.zeros(_END + 1, np.bool_)
        self.counts = np.zeros(_END + 1, np.uint8)
        self.offsets = np.zeros(_END + 1, np.int32)
        self._codes: list[int] = []
        self.codes = np.empty(0, np.uint64)
        self.kinds = np.empty(0, np.uint8)
        self.weights = np.empty(0, np.int64)

    def learn(self, codes: NDArray[np.uint32]) -> None:
        new = np.unique(codes[~self._known[codes]]).tolist()
        if not new:
            return
        for code in new:
            folded = [0] if code == _END else [_counted(character) for character in _fold(chr(code))]
            self.counts[code], self.offsets[code] = len(folded), len(self._codes)
            self._codes += folded
            self._known[code] = True
        self.codes = np.array(self._codes, np.uint64)
        self.kinds = np.full(len(self.codes), _LETTER, np.uint8)
        self.weights = np.full(len(self.codes), WORD, np.int64)
        for first, last, weight in _UNITS:
            units = (self.codes >= first) & (self.codes <= last)
            self.kinds[units], self.weights[units] = _UNIT, weight
        for first, last in _SYLLABLE_RESTS:
            self.kinds[(self.codes >= first) & (self.codes <= last)] = _REST
        self.kinds[self.codes == 0] = _SEPARATOR


_FOLDING = _Folding()


def _fold(character: str) -> str:
    """Return the characters that replace one in comparisons; "" for an invisible one.

    Each character is folded separately, so that it can be looked up. Combining marks are dropped, so their order and
    composition, which normal forms define, have no effect.
    """
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(one for one in folded.replace(_DOTLESS_I, "i") if not _dropped(one))


def _dropped(character: str) -> bool:
    if character in _INVISIBLE or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return True
    return unicodedata.category(character) == "Cc" and character not in _WHITE_CONTROLS


def _counted(character: str) -> int:
    """Return the code point of a letter or digit; 0 for a separator of words."""
    letter = unicodedata.category(character)[0] in "LNM" and character not in _APOSTROPHES
    return ord(character) if letter else 0


def _folded(codes: NDArray[np.uint32], places: NDArray[np.int64], size: int) -> tuple[NDArray[Any], ...]:
    """Fold characters: return the entry of each in the tables of _FOLDING, and its bytes [begin, end) of the text."""
    _FOLDING.learn(codes)
    counts = _FOLDING.counts[codes]
    if (counts != 1).any():
        kept = np.flatnonzero(counts)
        codes, places, counts = codes[kept], places[kept], counts[kept].astype(np.int64)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        entries = np.repeat(_FOLDING.offsets[codes], counts) + within
        begins, ends = np.repeat(places, counts), np.repeat(np.append(places[1:], size), counts)
    else:
        entries = _FOLDING.offsets[codes]
        begins, ends = places, np.append(places[1:], size)
    return entries, begins, ends


def _spans(numbers: NDArray[np.uint64], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of numbers[start:stop] for each span: equal sequences have equal hashes at any position."""
    powers, inverses = _powers(len(numbers))
    sums = np.zeros(len(numbers) + 1, np.uint64)
    np.cumsum(numbers * powers[: len(numbers)], out=sums[1:])
    return mix((sums[stops] - sums[starts]) * inverses[starts])


def _powers(length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return _ODD to the power 0, 1, …, and the inverses, modulo 2**64."""
    global _POWERS, _INVERSES
    if len(_POWERS) < length:
        size = max(length, PIECE)
        _POWERS, _INVERSES = np.ones((2, size), np.uint64)
        _POWERS[1:], _INVERSES[1:] = _ODD, pow(_ODD, -1, 2**64)
        np.cumprod(_POWERS, out=_POWERS)
        np.cumprod(_INVERSES, out=_INVERSES)
    return _POWERS, _INVERSES
