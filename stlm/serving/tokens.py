"""Ids with their log-probabilities, in the shapes of OpenAI's completions and chat completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipeline.tokenizers import Tokenizer
from stlm.generation import ScoredId


class Token(NamedTuple):
    """A scored id at its place in a text."""

    scored: ScoredId
    offset: int  # characters of the text before it
    known: bool = True  # False for symbols in front of a prompt, whose log-probability says nothing


class Tokens:
    """Ids of one text in their order, which are handed on as their text is: see `TextStream`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = 0  # characters of all ids
        self._told = 0  # characters handed on
        self._held: list[Token] = []

    def add(self, scored: ScoredId, known: bool = True) -> None:
        """The next id of the text."""
        pending, added = self._decoder.getstate()[0], self._tokenizer.decode_bytes([scored.id])
        text = self._decoder.decode(added)
        broken = pending and text.startswith("\ufffd") and not (pending + added).startswith("\ufffd".encode())
        self._held.append(Token(scored, self._read + bool(broken), known))  # it does not complete the character before
        self._read += len(text)

    def all(self) -> list[Token]:
        """The ids so far."""
        return list(self._held)

    def told(self, text: str, finished: bool = False) -> list[Token]:
        """The ids that begin within `text`, which is handed on now. Symbols that stand for no text go with the end.

        What begins behind the end of a finished text belongs to a stop string, and is left out.
        """
        self._told += len(text)
        if finished:
            found = [t for t in self._held if t.offset < self._told or not self._tokenizer.bytes_per_id[t.scored.id]]
            self._held = []
        else:
            found = [token for token in self._held if token.offset < self._told]
            self._held = self._held[len(found) :]
        return found


def spelling(tokenizer: Tokenizer, id: int) -> str:
    """An id as a string: its text, `bytes:\\xNN…` where it is no whole characters, or its name if it has no text."""
    text = tokenizer.decode_bytes([id])
    if not text:
        names = ("end_of_text", "start", "mask", "pad")
        return next((f"<|{name}|>" for name in names if getattr(tokenizer, f"{name}_id") == id), f"<|{id}|>")
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], first: int = 0) -> dict[str, Any]:
    """The `logprobs` of a completion: four lists. `first`: characters in front of the text of these tokens.

    The most probable ids of a place include the one that stands there.
    """
    return {
        "tokens": [spelling(tokenizer, token.scored.id) for token in tokens],
        "token_logprobs": [token.scored.log_probability if token.known else None for token in tokens],
        "top_logprobs": [_likeliest(tokenizer, token.scored) if token.known else None for token in tokens],
        "text_offset": [first + token.offset for token in tokens],
    }


def _likeliest(tokenizer: Tokenizer, scored: ScoredId) -> dict[str, float]:
    found: dict[str, float] = {}
    for id, log_probability in (*scored.likeliest, (scored.id, scored.log_probability)):
        found.setdefault(spelling(tokenizer, id), log_probability)  # of ids that look alike, the most probable
    return found


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """The `logprobs` of a chat completion: an object for each id."""

    def entry(id: int, log_probability: float) -> dict[str, Any]:
        return {
            "token": spelling(tokenizer, id),
            "logprob": log_probability,
            "bytes": list(tokenizer.decode_bytes([id])),
        }

    content = [
        {**entry(token.scored.id, token.scored.log_probability),
         "top_logprobs": [entry(*likely) for likely in token.scored.likeliest]}
        for token in tokens
    ]  # fmt: skip
    return {"content": content, "refusal": None}
