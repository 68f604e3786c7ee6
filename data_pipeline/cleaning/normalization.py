"""Unified spelling of text that looks the same: Unicode normalisation, spaces, line ends, control characters.

This is not lossless: the original text cannot be restored. It changes no letter: NFC only joins what Unicode calls
canonically equivalent (Unicode Standard Annex 15), and applying it twice changes nothing more.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# C0 and C1 without tab and newline, and the byte-order mark. Joiners and direction marks carry meaning and stay.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_LINE_TAILS = re.compile(r"[ \t]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"\n{3,}")

_REPLACEMENTS = (
    ("line ends made \\n", _LINE_ENDS, "\n"),
    ("spaces of other kinds made plain", _SPACES, " "),
    ("control characters removed", _CONTROLS, ""),
    ("spaces at line ends removed", _LINE_TAILS, ""),
    ("runs of blank lines made one", _BLANK_LINES, "\n\n"),
)


def normalize(text: str, edits: Counter[str]) -> tuple[str, str]:
    """Return the normalized text, and the rule that leaves it out or "". Count replacements by kind."""
    for name, pattern, replacement in _REPLACEMENTS:
        text, number = pattern.subn(replacement, text)
        if number:
            edits[f"normalize: {name}"] += number
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        edits["normalize: documents put into NFC"] += 1
    text = text.strip("\n")
    return text, "" if text.strip() else "normalize: nothing left"
