"""Log-probabilities of ids, in the formats of OpenAI's completions and chat completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from data_pipeline.tokenizers import Tokenizer
from stlm.generation import ScoredId


class Token(NamedTuple):
    """A scored id and its offset in a text."""

    scored: ScoredId
    offset: int  # characters of the text before it
    known: bool = True  # False for symbols before a prompt, whose log-probability has no meaning


class Tokens:
    """Ids of one text in order, released together with their text: see `TextStream`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_read = 0  # characters of all ids
        self._num_released = 0  # characters released
        self._held: list[Token] = []

    def add(self, scored: ScoredId, known: bool = True) -> None:
        """Append the next id of the text."""
        pending, added = self._decoder.getstate()[0], self._tokenizer.decode_bytes([scored.id])
        text = self._decoder.decode(added)
        broken = pending and text.startswith("\ufffd") and not (pending + added).startswith("\ufffd".encode())
        offset = self._num_read + bool(broken)  # a broken id does not complete the character before
        self._held.append(Token(scored, offset, known))
        self._num_read += len(text)

    def all(self) -> list[Token]:
        """Return the ids that are held."""
        return list(self._held)

    def release(self, text: str, finished: bool = False) -> list[Token]:
        """Release the ids that begin within `text`, the next piece. Symbols without text go with the last piece.

        Ids that begin after the end of a finished text belong to a stop string and are dropped.
        """
        self._num_released += len(text)
        if finished:
            textless = self._tokenizer.bytes_per_id == 0
            released = [t for t in self._held if t.offset < self._num_released or textless[t.scored.id]]
            self._held = []
        else:
            released = [token for token in self._held if token.offset < self._num_released]
            self._held = self._held[len(released) :]
        return released


def spelling(tokenizer: Tokenizer, id: int) -> str:
    """Return an id as a string: its text, `bytes:\\xNN…` for incomplete characters, or its name if it has no text."""
    text = tokenizer.decode_bytes([id])
    if not text:
        names = ("end_of_text", "start", "mask", "pad")
        return next((f"<|{name}|>" for name in names if getattr(tokenizer, f"{name}_id") == id), f"<|{id}|>")
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], first: int = 0) -> dict[str, Any]:
    """Return the `logprobs` of a completion: four lists. `first`: number of characters before these tokens.

    The most probable ids at a position include the id of the text.
    """
    return {
        "tokens": [spelling(tokenizer, token.scored.id) for token in tokens],
        "token_logprobs": [token.scored.log_probability if token.known else None for token in tokens],
        "top_logprobs": [_top_logprobs(tokenizer, token.scored) if token.known else None for token in tokens],
        "text_offset": [first + token.offset for token in tokens],
    }


def _top_logprobs(tokenizer: Tokenizer, scored: ScoredId) -> dict[str, float]:
    top: dict[str, float] = {}
    for id, log_probability in (*scored.top, (scored.id, scored.log_probability)):
        top.setdefault(spelling(tokenizer, id), log_probability)  # of ids spelled alike, the most probable
    return top


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the `logprobs` of a chat completion: an object for each id."""

    def entry(id: int, log_probability: float) -> dict[str, Any]:
        return {
            "token": spelling(tokenizer, id),
            "logprob": log_probability,
            "bytes": list(tokenizer.decode_bytes([id])),
        }

    content = [
        {**entry(token.scored.id, token.scored.log_probability),
         "top_logprobs": [entry(*one) for one in token.scored.top]}
        for token in tokens
    ]  # fmt: skip
    return {"content": content, "refusal": None}
