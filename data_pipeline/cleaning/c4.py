"""The rules that made C4 from Common Crawl: Raffel et al. 2020, arXiv 1910.10683, section 2.2.

They are meant for web pages, where a sentence is on one line: text with hard line breaks loses most of its lines. Three
rules of the section are left out: the language (the step `language`), spans of three sentences that occur twice
(`near-duplicates` instead), and the list of bad words, which also removes what minorities write about themselves (Dodge
et al. 2021, arXiv 2104.08758, section 5).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from data_pipeline.cleaning.limits import COUNT, Limits, limit
from data_pipeline.cleaning.words import count

# "a period, exclamation mark, question mark, or end quotation mark"; also those of other scripts
_STOPS = ".!?。．｡！？؟۔।॥։።။៕᠃"
_TERMINAL = (*_STOPS, '"', "”", "»", "」", "』")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
# Scripts without spaces between words have none after a sentence either.
_SENTENCE_END = re.compile(r"[.!?؟۔։።]+[\"”’'»)\]]*(?=\s|\Z)|[。．｡！？।॥။៕᠃]+")


@dataclass(frozen=True)
class C4Limits(Limits):
    """The numbers in the rules."""

    min_words_in_line: int = limit(5, COUNT, "of fewer than {min_words_in_line} words")
    min_sentences: int = limit(3, COUNT, "fewer than {min_sentences} sentences")
    max_curly_brackets: int = limit(0, COUNT, "more than {max_curly_brackets} curly brackets")

    def rule(self, name: str) -> str:
        return (
            "a curly bracket" if name == "max_curly_brackets" and self.max_curly_brackets == 0 else super().rule(name)
        )


_DEFAULT = C4Limits()


def c4(text: str, edits: Counter[str], limits: C4Limits = _DEFAULT) -> tuple[str, str]:
    """Return the lines that the rules keep, and the rule that leaves the document out or "". Count removed lines by
    rule.
    """
    if text.count("{") > limits.max_curly_brackets:
        return text, f"c4: {limits.rule('max_curly_brackets')}"
    if "lorem ipsum" in text.lower():
        return text, "c4: lorem ipsum"
    text, citations = _CITATION.subn("", text)
    if citations:
        edits["c4: citation markers removed"] += citations
    kept: list[str] = []
    for line in text.split("\n"):
        if not line.strip():
            kept.append(line)
        elif rule := _line_rule(line, limits):
            edits[f"c4: lines {rule}"] += 1
        else:
            kept.append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
    if len(_SENTENCE_END.findall(text)) < limits.min_sentences:
        return text, f"c4: {limits.rule('min_sentences')}"
    return text, ""


def _line_rule(line: str, limits: C4Limits) -> str:
    """Return the rule that leaves a line out; "" if it stays."""
    if not line.rstrip().endswith(_TERMINAL) or line.rstrip().endswith("..."):
        return "without terminal punctuation"
    if len(line.split()) < limits.min_words_in_line and (line.isascii() or count(line) < limits.min_words_in_line):
        return limits.rule("min_words_in_line")
    lower = line.lower()
    if "javascript" in lower:
        return "with the word Javascript"
    return "with a policy notice" if any(policy in lower for policy in _POLICIES) else ""
