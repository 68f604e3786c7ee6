"""The steps that process one document at a time, in the order of their application.

Their results depend on the document alone, so they run while the sources are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from data_pipeline.cleaning.c4 import C4Limits, c4
from data_pipeline.cleaning.gopher import GopherLimits, gopher
from data_pipeline.cleaning.language import Language, LanguageLimits
from data_pipeline.cleaning.limits import Limits
from data_pipeline.cleaning.normalization import normalize
from data_pipeline.errors import DataError
from data_pipeline.storage.cleaning_record import Record

# The text, and a counter of its changes → the changed text, and the rule that leaves it out, or "".
Step = Callable[[str, Counter[str]], tuple[str, str]]

NORMALIZE = "normalize"
NEAR_DUPLICATES = "near-duplicates"
STEPS = (NORMALIZE, "language", "c4", "gopher", NEAR_DUPLICATES)
LIBRARIES = {"language": "py3langid", NEAR_DUPLICATES: "rensa"}  # their versions affect what a step leaves out


def parse_steps(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the named steps in the order of STEPS. Raises DataError for an unknown name or one given twice."""
    for number, name in enumerate(names):
        if name not in STEPS:
            near = get_close_matches(name, STEPS, 1, 0)
            raise DataError(f"unknown cleaning step {name!r}; nearest: {near[0]}; the steps are: {', '.join(STEPS)}")
        if name in names[:number]:
            raise DataError(f"the cleaning step {name!r} is named twice")
    return tuple(step for step in STEPS if step in names)


_LANGUAGE, _C4, _GOPHER = LanguageLimits(), C4Limits(), GopherLimits()


@dataclass(frozen=True)
class Cleaning:
    """The selected steps and their settings; picklable, and the same for all units."""

    steps: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # codes, of the step "language"
    language: LanguageLimits = _LANGUAGE
    c4: C4Limits = _C4
    gopher: GopherLimits = _GOPHER

    @property
    def limits(self) -> dict[str, Limits]:
        """The limits of each step that has any."""
        return {"language": self.language, "c4": self.c4, "gopher": self.gopher}


class Cleaner:
    """The selected steps as a function of one document at a time, with a record of their effects."""

    def __init__(self, cleaning: Cleaning) -> None:
        every: dict[str, Step] = {
            NORMALIZE: normalize,
            "language": Language(cleaning.languages, cleaning.language),
            "c4": partial(c4, limits=cleaning.c4),
            "gopher": partial(gopher, limits=cleaning.gopher),
        }
        self._steps = [every[name] for name in cleaning.steps if name in every]
        self.record = Record()
        self.rule = ""  # the rule that left out the last such document

    def __call__(self, document: bytes) -> bytes | None:
        """Return the cleaned document as UTF-8; None if a rule leaves it out, which is then recorded. document: valid
        UTF-8.
        """
        if not self._steps:
            return document
        text = document.decode("utf-8")
        for step in self._steps:
            text, rule = step(text, self.record.edits)
            if rule:
                self.record.remove(rule, document)
                self.rule = rule
                return None
        return text.encode("utf-8")
