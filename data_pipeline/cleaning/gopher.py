"""The quality and repetition rules of MassiveText: Rae et al. 2021, arXiv 2112.11446, appendix A1.1, with the
thresholds of its text and of its Table A1.

Words are what stands between white space. A document is left out by the first rule that it breaks, in the order below.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# "Quality Filtering"
_MIN_WORDS, _MAX_WORDS = 50, 100_000
_MIN_MEAN_LENGTH, _MAX_MEAN_LENGTH = 3, 10
_MAX_SYMBOLS_PER_WORD = 0.1  # of hashes, and of ellipses
_MAX_BULLET_LINES = 0.9
_MAX_ELLIPSIS_LINES = 0.3
_MIN_ALPHABETIC_WORDS = 0.8
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_MIN_STOP_WORDS = 2

# "Repetition Removal", Table A1
_MAX_DUPLICATE_LINES = 0.30
_MAX_DUPLICATE_PARAGRAPHS = 0.30
_MAX_DUPLICATE_LINE_CHARACTERS = 0.20
_MAX_DUPLICATE_PARAGRAPH_CHARACTERS = 0.20
_MAX_TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # characters in the most frequent one
_MAX_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # characters in all that repeat

_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
_ELLIPSES = ("...", "…")
_WORD = re.compile(r"\S+")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


def gopher(text: str, edits: Counter[str]) -> tuple[str, str]:
    """The text as it is, and the rule by which it goes."""
    words = _WORD.findall(text)
    rule = _quality_rule(text, words) or _repetition_rule(text, words)
    return text, f"gopher: {rule}" if rule else ""


def _quality_rule(text: str, words: list[str]) -> str:
    if len(words) < _MIN_WORDS:
        return f"fewer than {_MIN_WORDS} words"
    if len(words) > _MAX_WORDS:
        return f"more than {_MAX_WORDS:,} words"
    mean = sum(map(len, words)) / len(words)
    if not _MIN_MEAN_LENGTH <= mean <= _MAX_MEAN_LENGTH:
        return f"mean length of words outside {_MIN_MEAN_LENGTH} to {_MAX_MEAN_LENGTH}"
    if text.count("#") > _MAX_SYMBOLS_PER_WORD * len(words):
        return f"more than {_MAX_SYMBOLS_PER_WORD} hashes per word"
    if sum(map(text.count, _ELLIPSES)) > _MAX_SYMBOLS_PER_WORD * len(words):
        return f"more than {_MAX_SYMBOLS_PER_WORD} ellipses per word"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > _MAX_BULLET_LINES * len(lines):
        return f"more than {_MAX_BULLET_LINES:.0%} of lines begin with a bullet"
    if sum(line.endswith(_ELLIPSES) for line in lines) > _MAX_ELLIPSIS_LINES * len(lines):
        return f"more than {_MAX_ELLIPSIS_LINES:.0%} of lines end with an ellipsis"
    if sum(_LETTER.search(word) is not None for word in words) < _MIN_ALPHABETIC_WORDS * len(words):
        return f"fewer than {_MIN_ALPHABETIC_WORDS:.0%} of words with a letter"
    if len(_STOP_WORDS.intersection(word.strip(".,;:!?\"'()").lower() for word in words)) < _MIN_STOP_WORDS:
        return f"fewer than {_MIN_STOP_WORDS} of the words the, be, to, of, and, that, have, with"
    return ""


def _repetition_rule(text: str, words: list[str]) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [part.strip() for part in _PARAGRAPH_BREAK.split(text) if part.strip()]
    for name, pieces, most, most_characters in (
        ("lines", lines, _MAX_DUPLICATE_LINES, _MAX_DUPLICATE_LINE_CHARACTERS),
        ("paragraphs", paragraphs, _MAX_DUPLICATE_PARAGRAPHS, _MAX_DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        number, characters = _duplicates(pieces)
        if number > most * len(pieces):
            return f"more than {most:.0%} of {name} are duplicates"
        if characters > most_characters * len(text):
            return f"more than {most_characters:.0%} of characters in duplicate {name}"

    lengths = [len(word) for word in words]
    characters = sum(lengths)
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word, len(numbers)) for word in words]
    for n, share in _MAX_TOP_NGRAM.items():
        if _top_ngram_characters(ids, lengths, n) > share * characters:
            return f"more than {share:.0%} of characters in one {n}-gram"
    for n, share in _MAX_DUPLICATE_NGRAMS.items():
        repeated = _repeated_ngram_characters(ids, lengths, n)
        if not repeated:
            return ""  # no longer one can repeat either
        if repeated > share * characters:
            return f"more than {share:.0%} of characters in repeated {n}-grams"
    return ""


def _duplicates(pieces: list[str]) -> tuple[int, int]:
    """How many pieces equal an earlier one, and their characters."""
    repeated = [(piece, number - 1) for piece, number in Counter(pieces).items() if number > 1]
    return sum(number for _, number in repeated), sum(len(piece) * number for piece, number in repeated)


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def _top_ngram_characters(ids: list[int], lengths: list[int], n: int) -> int:
    """Characters of the words inside the most frequent n-gram; 0 if none occurs twice."""
    ngrams = _ngrams(ids, n)
    counts = Counter(ngrams)
    most = max(counts.values(), default=0)
    if most < 2:
        return 0
    places: dict[tuple[int, ...], list[int]] = {}
    for place, ngram in enumerate(ngrams):
        if counts[ngram] == most:
            places.setdefault(ngram, []).append(place)
    return max(_characters(found, lengths, n) for found in places.values())


def _repeated_ngram_characters(ids: list[int], lengths: list[int], n: int) -> int:
    """Characters of the words inside any n-gram that occurs more than once."""
    ngrams = _ngrams(ids, n)
    counts = Counter(ngrams)
    if len(counts) == len(ngrams):
        return 0
    return _characters([place for place, ngram in enumerate(ngrams) if counts[ngram] > 1], lengths, n)


def _characters(places: list[int], lengths: list[int], n: int) -> int:
    """Characters of the words in the n-grams that begin at ascending places; where they overlap, counted once."""
    total = covered = 0
    for place in places:
        total += sum(lengths[max(place, covered) : place + n])
        covered = place + n
    return total
