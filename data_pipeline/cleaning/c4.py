"""The rules that made C4 out of Common Crawl: Raffel et al. 2020, arXiv 1910.10683, section 2.2.

They were made for web pages, where a sentence is on one line: text with hard line breaks loses most of its lines.
Of the section, three rules are left out: the language (the step `language` does that), spans of three sentences that
occur twice (`near-duplicates` in their place), and the list of bad words, which takes with it what minorities write
about themselves (Dodge et al. 2021, arXiv 2104.08758, section 5).
"""

from __future__ import annotations

import re
from collections import Counter

_TERMINAL = (".", "!", "?", '"', "”")  # "a period, exclamation mark, question mark, or end quotation mark"
_MIN_WORDS_IN_LINE = 5
_MIN_SENTENCES = 3
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"[.!?]+[\"”’')\]]*(?=\s|\Z)")


def c4(text: str, edits: Counter[str]) -> tuple[str, str]:
    """The lines that the rules keep, or the rule by which the document goes. Lines left out are counted by rule."""
    if "{" in text:
        return text, "c4: a curly bracket"
    if "lorem ipsum" in text.lower():
        return text, "c4: lorem ipsum"
    text, citations = _CITATION.subn("", text)
    if citations:
        edits["c4: citation markers removed"] += citations
    kept: list[str] = []
    for line in text.split("\n"):
        if not line.strip():
            kept.append(line)
        elif rule := _line_rule(line):
            edits[f"c4: lines {rule}"] += 1
        else:
            kept.append(line)
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
    if len(_SENTENCE_END.findall(text)) < _MIN_SENTENCES:
        return text, f"c4: fewer than {_MIN_SENTENCES} sentences"
    return text, ""


def _line_rule(line: str) -> str:
    """Why a line is left out; "" if it stays."""
    if not line.rstrip().endswith(_TERMINAL) or line.rstrip().endswith("..."):
        return "without terminal punctuation"
    if len(line.split()) < _MIN_WORDS_IN_LINE:
        return f"of fewer than {_MIN_WORDS_IN_LINE} words"
    lower = line.lower()
    if "javascript" in lower:
        return "with the word Javascript"
    return "with a policy notice" if any(policy in lower for policy in _POLICIES) else ""
