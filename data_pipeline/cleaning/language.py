"""Documents in other languages, told by py3langid: naive Bayes over byte n-grams for 97 languages (Lui and Baldwin
2012, "langid.py: An Off-the-shelf Language Identification Tool", ACL). Its model lies inside the package.
"""

from __future__ import annotations

import functools
from collections import Counter
from difflib import get_close_matches
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.extras import how_to_install

# The share of the probability that the languages asked for must have. FineWeb takes the same (Penedo et al. 2024, arXiv
# 2406.17557, section 3.3), for another classifier.
MINIMUM_PROBABILITY = 0.65
_LONGEST = 4096  # characters that are looked at, from the beginning

_Classifier = Any


def check_languages(languages: tuple[str, ...]) -> None:
    """DataError if a code is not known, or the library is not installed."""
    known = _classifier().labels
    for code in languages:
        if code not in known:
            near = get_close_matches(code, known, 1, 0)
            raise DataError(f"unknown language {code!r}; nearest: {near[0]}; known: {', '.join(sorted(known))}")


class Language:
    """Leaves out what is not in one of some languages."""

    def __init__(self, languages: tuple[str, ...]) -> None:
        """languages: ISO 639-1 codes."""
        self._languages = frozenset(languages)

    def __call__(self, text: str, edits: Counter[str]) -> tuple[str, str]:
        ranking = _classifier().rank(text[:_LONGEST])
        if sum(share for code, share in ranking if code in self._languages) >= MINIMUM_PROBABILITY:
            return text, ""
        best, share = ranking[0]
        return text, f"language: {best}" if share >= MINIMUM_PROBABILITY else "language: uncertain"


@functools.lru_cache(maxsize=1)
def _classifier() -> _Classifier:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(f"the step 'language' needs py3langid: {how_to_install('py3langid')}") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
