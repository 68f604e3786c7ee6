"""Removal of documents in other languages, identified by py3langid: naive Bayes over byte n-grams for 97 languages (Lui
and Baldwin 2012, "langid.py: An Off-the-shelf Language Identification Tool", ACL). The package contains its model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from data_pipeline.cleaning.limits import SHARE, Limits, limit
from data_pipeline.errors import DataError
from data_pipeline.extras import how_to_install

_LONGEST = 4096  # characters that are classified, from the beginning

_Classifier = Any


@dataclass(frozen=True)
class LanguageLimits(Limits):
    """The confidence that the classifier must have."""

    # The least probability of the requested languages together. FineWeb uses the same (Penedo et al. 2024,
    # arXiv 2406.17557, section 3.3), for another classifier.
    min_probability: float = limit(0.65, SHARE, "less likely than {min_probability}")


_DEFAULT = LanguageLimits()


def language_codes(names: Sequence[str]) -> tuple[str, ...]:
    """Return the ISO 639-1 codes of languages named in any usual way: en, eng, en-US, English, Deutsch.

    Raises DataError if one is not known, or a library is not installed.
    """
    known = _classifier().labels
    codes = []
    for name in names:
        wanted = name.strip().lower().replace("_", "-")
        primary = wanted.partition("-")[0]
        code = (
            primary if primary in known else _codes().get(wanted) or _codes().get(primary) or _own_names().get(wanted)
        )
        if code is None:
            near = get_close_matches(wanted, [*known, *_codes()], 1, 0)[0]
            raise DataError(f"unknown language {name!r}; nearest: {near}; known: {', '.join(sorted(known))}")
        codes.append(code)
    return tuple(dict.fromkeys(codes))


@functools.lru_cache(maxsize=1)
def _codes() -> dict[str, str]:
    """Return the classifier's codes by other codes and by English names."""
    try:
        from babel import Locale
        from babel.core import get_global
    except ImportError as error:
        raise DataError(f"the step 'language' needs babel: {how_to_install('babel')}") from error
    known = _classifier().labels
    codes = {alias: code for alias, code in get_global("language_aliases").items() if code in known}
    codes |= {name.lower(): code for code, name in Locale("en").languages.items() if code in known}
    return codes | {"nb": "no", "norwegian bokmål": "no", "farsi": "fa", "mandarin": "zh"}


@functools.lru_cache(maxsize=1)
def _own_names() -> dict[str, str]:
    """Return the classifier's codes by the languages' own names: deutsch, français."""
    from babel import Locale, UnknownLocaleError

    names = {}
    for code in _classifier().labels:
        with suppress(UnknownLocaleError, ValueError):
            names[str(Locale.parse(code).get_language_name()).lower()] = code
    return names


class Language:
    """A step that leaves out text in other than the given languages."""

    def __init__(self, languages: tuple[str, ...], limits: LanguageLimits = _DEFAULT) -> None:
        """languages: ISO 639-1 codes."""
        self._languages = frozenset(languages)
        self._least = limits.min_probability

    def __call__(self, text: str, edits: Counter[str]) -> tuple[str, str]:
        ranking = _classifier().rank(text[:_LONGEST])
        if sum(share for code, share in ranking if code in self._languages) >= self._least:
            return text, ""
        best, share = ranking[0]
        return text, f"language: {best}" if share >= self._least else "language: uncertain"


@functools.lru_cache(maxsize=1)
def _classifier() -> _Classifier:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(f"the step 'language' needs py3langid: {how_to_install('py3langid')}") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
