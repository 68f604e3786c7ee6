"""Safe places to cut a long text before a Hugging Face tokenizer encodes it, so that its ids stay the same.

The `tokenizers` library takes about 130 bytes of memory for each byte of a text, so a long one is encoded in pieces. A
model of the library never joins what its pre-tokenizer has split. So a place is safe if the pre-tokenizer splits there
regardless of the rest of the text, and finds in either part what it finds in the whole. This is decided from the rules
of the pre-tokenizer, which the library tries from left to right. `_RULES` holds those in use (GPT-2, GPT-4, Llama 3,
Qwen 2, o200k); none of them matches across a place of `_PLACES`, or looks beyond it. A tokenizer with another rule, or
with a normalizer, encodes every text as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

PIECE = 1 << 20  # bytes of text

# A rule → the kinds of characters whose runs it matches: letters, numbers, white space, others.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_RULES = {
    **dict.fromkeys(["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTIONS, "'(?i:[sdmt]|ll|ve|re)"], ""),
    **dict.fromkeys([r"\p{L}+", r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+"], "L"),
    **dict.fromkeys([r"[^\r\n\p{L}\p{N}]?+\p{L}++"], "L"),
    **dict.fromkeys([rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_CONTRACTIONS}?"], ""),
    **dict.fromkeys([rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*{_CONTRACTIONS}?"], "L"),
    **dict.fromkeys([r"\p{N}", r"\p{N}+", r" ?\p{N}+", r"\p{N}{1,2}", r"\p{N}{1,3}", r"\p{N}{1,3}+"], "N"),
    **dict.fromkeys([r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*"], "O"),
    **dict.fromkeys([r" ?[^\s\p{L}\p{N}]++[\r\n]*+", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"], "O"),
    **dict.fromkeys([r"\s*[\r\n]", r"\s*[\r\n]+", r"\s+(?!\S)"], ""),
    **dict.fromkeys([r"\s", r"\s+"], "S"),
}
_KINDS = frozenset("LNSO")

# Old letters, known to every version of Unicode: Latin, Greek, Cyrillic, Hebrew, Arabic, Japanese, Chinese, Korean.
_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u0220\u03a3-\u03ce\u0400-\u0481\u05d0-\u05ea\u0621-\u063a\u0641-\u064a"
    "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_OTHERS = (
    "!-&(-/:-@\\[-`{-~\u3001\u3002\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"  # no apostrophe: it may begin a rule
)
# A text may be cut between them. The character before is never white space, so no rule looks beyond the place.
_PLACES = re.compile(
    r"(?<=\S)(?= )"
    rf"|(?<=[{_LETTERS}0-9])(?=[\s{_OTHERS}])"
    r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
_NEAR_THE_END = 4096  # characters: searched first for a place


class Cutter:
    """Cutting of texts at places where their ids stay the same."""

    def __init__(self, definition: dict[str, Any]) -> None:
        """definition: of the library's tokenizer as used, without prefixes and templates."""
        parts = definition.get("pre_tokenizer") or {}
        stages = [_splits(stage) for stage in (parts.get("pretokenizers", [parts]) if parts else [])]
        self.knows_places = not definition.get("normalizer") and None not in stages and True in stages
        # Added words are matched before everything else, at any position.
        words = [token["content"] for token in definition.get("added_tokens") or []]
        self._within_words = {word[place : place + 2] for word in words for place in range(len(word) - 1)}

    def pieces(self, raw: bytes) -> Iterator[str]:
        """Yield a text of valid UTF-8 in pieces of about PIECE bytes, if there are places to cut."""
        start, size = 0, PIECE
        while self.knows_places and len(raw) - start > size:
            stop = start + size
            while raw[stop] & 0xC0 == 0x80:  # within a character
                stop -= 1
            text = raw[start:stop].decode("utf-8")
            if place := self._last_place(text):
                yield text[:place]
                start, size = start + len(text[:place].encode("utf-8")), PIECE
            else:
                size *= 2
        if start < len(raw):
            yield raw[start:].decode("utf-8")

    def _last_place(self, text: str) -> int:
        """Return the last place to cut; 0 if there is none."""
        for begin in (max(len(text) - _NEAR_THE_END, 0), 0):
            found = [match.start() for match in _PLACES.finditer(text, begin)]
            for place in reversed(found):
                if text[place - 1 : place + 1] not in self._within_words:
                    return place
        return 0


def _splits(stage: dict[str, Any]) -> bool | None:
    """Return True if a stage of the pre-tokenizer splits at every place, False if it may not but leaves it to the
    others.

    None: the stage is unknown.
    """
    match stage.get("type"):
        case "ByteLevel" if not stage.get("add_prefix_space"):
            return bool(stage.get("use_regex", True))  # the library's own rules: those of GPT-2
        case "Digits":
            return False
        case "Split":
            whole = (stage.get("behavior"), bool(stage.get("invert"))) in (("Isolated", False), ("Removed", True))
            rules = _alternatives(str((stage.get("pattern") or {}).get("Regex", "")))
            known = all(rule in _RULES for rule in rules)
            return True if whole and known and set("".join(_RULES[rule] for rule in rules)) >= _KINDS else None
    return None


def _alternatives(pattern: str) -> list[str]:
    """Return the rules of a pattern: the parts between the | outside brackets."""
    rules, depth, begin = [], 0, 0
    for place, character in enumerate(pattern):
        depth += (character in "([") - (character in ")]")
        if character == "|" and depth == 0:
            rules.append(pattern[begin:place])
            begin = place + 1
    return [*rules, pattern[begin:]]
