"""Quality of generated text: variety, repetition, copies from the training text, readability."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stlm.errors import StlmError
from stlm.evals.report import table
from stlm.stlm import STLM

NUM_TEXTS = 20
MAX_NEW_IDS = 200
_COPIED_FROM = 16 << 20  # bytes at the beginning of the training text that are searched for copies


def write_texts(model: STLM) -> list[str]:
    """Generate texts from an empty prompt at temperature 1 with seeds 0, 1, …; the same texts every time."""
    return [model.generate("", max_new_ids=MAX_NEW_IDS, seed=seed) for seed in range(NUM_TEXTS)]


def measure_text(
    texts: Sequence[str], documents: Iterable[str], reference: STLM | None = None
) -> tuple[str, dict[str, Any]]:
    """Return a table of the texts' measures and its values; `documents` are searched for copies.

    `reference`: another model, to measure its bits per byte on the texts. Raises StlmError if all texts are empty.
    """
    words = [text.split() for text in texts]
    if not any(words):
        raise StlmError("text_quality: all generated texts are empty; train the model longer")
    source = training_suffixes(documents)
    copied = [longest_copy(text.encode(), source) for text in texts]
    values: dict[str, Any] = {
        "texts": len(texts),
        "words": sum(map(len, words)),
        **{f"distinct_{n}": distinct(words, n) for n in (1, 2, 3, 4)},
        "repetition_4": repetition(words, 4),
        "self_bleu": self_bleu(texts),
        "longest_copy_bytes": {"mean": sum(copied) / len(copied), "max": max(copied)},
        "reading_ease": reading_ease(" ".join(texts)),
    }
    if reference is not None:
        nats = -sum(reference.log_likelihood(text) for text in texts if text)
        values["reference_bits_per_byte"] = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    rows = [[name, f"{value:.4g}"] for name, value in values.items() if not isinstance(value, dict)]
    rows.append(["longest_copy_bytes", f"{values['longest_copy_bytes']['mean']:.4g} (at most {max(copied)})"])
    return table(rows, ["text", ""], "lr"), values


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return distinct n-grams of words over all n-grams (Li et al. 2016, arXiv 1510.03055, section 5.2)."""
    grams = [gram for words in texts for gram in _ngrams(words, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(texts: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of n-grams of words that repeat one of the same text (Welleck et al. 2020, arXiv 1908.04319)."""
    counts = [Counter(_ngrams(words, n)) for words in texts]
    total = sum(count.total() for count in counts)
    return 1 - sum(map(len, counts)) / total if total else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU of each text with all others as references: 100 where all are alike (Zhu et al. 2018, arXiv
    1802.01886, section 3.2)."""
    from sacrebleu import sentence_bleu

    if len(texts) < 2:
        return math.nan
    others = [[other for place, other in enumerate(texts) if place != own] for own in range(len(texts))]
    return sum(sentence_bleu(text, rest).score for text, rest in zip(texts, others, strict=True)) / len(texts)


class Suffixes:
    """A text with its suffix array, for substring search (Manber and Myers 1993)."""

    def __init__(self, text: bytes) -> None:
        from pydivsufsort import divsufsort

        self.text = text
        self.order = divsufsort(np.frombuffer(bytearray(text), np.uint8)) if text else np.empty(0, np.int64)


def training_suffixes(documents: Iterable[str]) -> Suffixes:
    """Return the suffixes of the first documents, each followed by a byte that no text contains."""
    parts, size = [], 0
    for document in documents:
        parts.append(document.encode() + b"\xff")
        size += len(parts[-1])
        if size >= _COPIED_FROM:
            break
    return Suffixes(b"".join(parts))


def longest_copy(text: bytes, source: Suffixes) -> int:
    """Return the length in bytes of the longest part of `text` that occurs in `source`, counting at most 4096."""
    longest = 0
    for start in range(len(text)):
        rest = text[start : start + 4096]
        if len(rest) <= longest:
            break
        place = bisect_left(source.order, rest, key=lambda at: source.text[at : at + len(rest)])
        for neighbour in source.order[max(0, place - 1) : place + 1]:
            longest = max(longest, _common_prefix_length(rest, source.text[neighbour : neighbour + len(rest)]))
    return longest


def reading_ease(text: str) -> float:
    """Return the Flesch reading ease (Flesch 1948): 100 is very easy, 0 very hard. Syllables are counted by pyphen's
    hyphenation patterns."""
    from pyphen import Pyphen

    words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", text)
    if not words:
        return math.nan
    hyphens = Pyphen(lang="en_US", left=1, right=1)
    syllables = sum(1 + len(hyphens.positions(word.lower())) for word in words)
    sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", text)))
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _common_prefix_length(one: bytes, two: bytes) -> int:
    """Return the number of bytes that both begin with."""
    length = min(len(one), len(two))
    differing = np.flatnonzero(np.frombuffer(one[:length], np.uint8) != np.frombuffer(two[:length], np.uint8))
    return int(differing[0]) if len(differing) else length
