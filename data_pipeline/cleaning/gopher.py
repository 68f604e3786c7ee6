"""The quality and repetition rules of MassiveText: Rae et al. 2021, arXiv 2112.11446, appendix A1.1, with the
thresholds of its text and of its Table A1.

Words are separated by white space, so text of a script without spaces has few. The first rule that a document breaks,
in the order below, leaves it out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.cleaning.limits import COUNT, NUMBER, SHARE, WORDS, Limits, limit
from data_pipeline.errors import DataError


@dataclass(frozen=True)
class GopherLimits(Limits):
    """The thresholds. Shares of n-grams are of the characters inside them."""

    # "Quality Filtering"
    min_words: int = limit(50, COUNT, "fewer than {min_words} words")
    max_words: int = limit(100_000, COUNT, "more than {max_words} words")
    min_mean_length: float = limit(3, NUMBER, "mean length of words outside {min_mean_length} to {max_mean_length}")
    max_mean_length: float = limit(10, NUMBER, "mean length of words outside {min_mean_length} to {max_mean_length}")
    max_hashes: float = limit(0.1, NUMBER, "more than {max_hashes} hashes per word")
    max_ellipses: float = limit(0.1, NUMBER, "more than {max_ellipses} ellipses per word")
    max_bullet_lines: float = limit(0.9, SHARE, "more than {max_bullet_lines} of lines begin with a bullet")
    max_ellipsis_lines: float = limit(0.3, SHARE, "more than {max_ellipsis_lines} of lines end with an ellipsis")
    min_alphabetic_words: float = limit(0.8, SHARE, "fewer than {min_alphabetic_words} of words with a letter")
    min_stop_words: int = limit(2, COUNT, "fewer than {min_stop_words} of the words {stop_words}")
    stop_words: tuple[str, ...] = limit(
        ("the", "be", "to", "of", "and", "that", "have", "with"),
        WORDS,
        "fewer than {min_stop_words} of the words {stop_words}",
    )

    # "Repetition Removal", Table A1
    max_duplicate_lines: float = limit(0.3, SHARE, "more than {max_duplicate_lines} of lines are duplicates")
    max_duplicate_line_characters: float = limit(
        0.2, SHARE, "more than {max_duplicate_line_characters} of characters in duplicate lines"
    )
    max_duplicate_paragraphs: float = limit(
        0.3, SHARE, "more than {max_duplicate_paragraphs} of paragraphs are duplicates"
    )
    max_duplicate_paragraph_characters: float = limit(
        0.2, SHARE, "more than {max_duplicate_paragraph_characters} of characters in duplicate paragraphs"
    )
    max_top_2gram: float = limit(0.20, SHARE, "more than {max_top_2gram} of characters in one 2-gram")
    max_top_3gram: float = limit(0.18, SHARE, "more than {max_top_3gram} of characters in one 3-gram")
    max_top_4gram: float = limit(0.16, SHARE, "more than {max_top_4gram} of characters in one 4-gram")
    max_repeated_5grams: float = limit(0.15, SHARE, "more than {max_repeated_5grams} of characters in repeated 5-grams")
    max_repeated_6grams: float = limit(0.14, SHARE, "more than {max_repeated_6grams} of characters in repeated 6-grams")
    max_repeated_7grams: float = limit(0.13, SHARE, "more than {max_repeated_7grams} of characters in repeated 7-grams")
    max_repeated_8grams: float = limit(0.12, SHARE, "more than {max_repeated_8grams} of characters in repeated 8-grams")
    max_repeated_9grams: float = limit(0.11, SHARE, "more than {max_repeated_9grams} of characters in repeated 9-grams")
    max_repeated_10grams: float = limit(
        0.10, SHARE, "more than {max_repeated_10grams} of characters in repeated 10-grams"
    )

    def __post_init__(self) -> None:
        if self.min_stop_words > len(self.stop_words):
            raise DataError(
                f"gopher.min_stop_words={self.min_stop_words} is above the number of gopher.stop_words, "
                f"{len(self.stop_words)}"
            )


_BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*")
_ELLIPSES = ("...", "…")
_WORD = re.compile(r"\S+")
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")  # punctuation around a word
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_DEFAULT = GopherLimits()


def gopher(text: str, edits: Counter[str], limits: GopherLimits = _DEFAULT) -> tuple[str, str]:
    """Return the text unchanged, and the rule that leaves it out or ""."""
    words = _WORD.findall(text)
    broken = _broken_quality(text, words, limits) or _broken_repetition(text, words, limits)
    return text, f"gopher: {limits.rule(broken)}" if broken else ""


def _broken_quality(text: str, words: list[str], limits: GopherLimits) -> str:
    """Return the name of the first limit of quality that is broken; "" for none."""
    number = len(words)
    if number < limits.min_words:
        return "min_words"
    if number > limits.max_words:
        return "max_words"
    if not limits.min_mean_length <= sum(map(len, words)) / max(number, 1) <= limits.max_mean_length:
        return "min_mean_length"
    if text.count("#") > limits.max_hashes * number:
        return "max_hashes"
    if sum(map(text.count, _ELLIPSES)) > limits.max_ellipses * number:
        return "max_ellipses"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if sum(line.startswith(_BULLETS) for line in lines) > limits.max_bullet_lines * len(lines):
        return "max_bullet_lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) > limits.max_ellipsis_lines * len(lines):
        return "max_ellipsis_lines"
    if sum(_LETTER.search(word) is not None for word in words) < limits.min_alphabetic_words * number:
        return "min_alphabetic_words"
    stripped = {_EDGES.sub("", word).lower() for word in words}
    return "min_stop_words" if len(stripped.intersection(limits.stop_words)) < limits.min_stop_words else ""


def _broken_repetition(text: str, words: list[str], limits: GopherLimits) -> str:
    """Return the name of the first limit of repetition that is broken; "" for none."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    paragraphs = [part.strip() for part in _PARAGRAPH_BREAK.split(text) if part.strip()]
    for name, pieces in (("line", lines), ("paragraph", paragraphs)):
        number, characters = _duplicates(pieces)
        if number > getattr(limits, f"max_duplicate_{name}s") * len(pieces):
            return f"max_duplicate_{name}s"
        if characters > getattr(limits, f"max_duplicate_{name}_characters") * len(text):
            return f"max_duplicate_{name}_characters"

    lengths = [len(word) for word in words]
    characters = sum(lengths)
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word, len(numbers)) for word in words]
    for n in (2, 3, 4):
        if _top_ngram_characters(ids, lengths, n) > getattr(limits, f"max_top_{n}gram") * characters:
            return f"max_top_{n}gram"
    for n in range(5, 11):
        repeated = _repeated_ngram_characters(ids, lengths, n)
        if not repeated:
            return ""  # then no longer one repeats either
        if repeated > getattr(limits, f"max_repeated_{n}grams") * characters:
            return f"max_repeated_{n}grams"
    return ""


def _duplicates(pieces: list[str]) -> tuple[int, int]:
    """Return the number of pieces equal to an earlier one, and their characters."""
    repeated = [(piece, number - 1) for piece, number in Counter(pieces).items() if number > 1]
    return sum(number for _, number in repeated), sum(len(piece) * number for piece, number in repeated)


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def _top_ngram_characters(ids: list[int], lengths: list[int], n: int) -> int:
    """Return the characters of the words inside the most frequent n-gram; 0 if none occurs twice."""
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
    """Return the characters of the words inside any n-gram that occurs more than once."""
    ngrams = _ngrams(ids, n)
    counts = Counter(ngrams)
    if len(counts) == len(ngrams):
        return 0
    return _characters([place for place, ngram in enumerate(ngrams) if counts[ngram] > 1], lengths, n)


def _characters(places: list[int], lengths: list[int], n: int) -> int:
    """Return the characters of the words in the n-grams at ascending positions; overlaps are counted once."""
    total = covered = 0
    for place in places:
        total += sum(lengths[max(place, covered) : place + n])
        covered = place + n
    return total
