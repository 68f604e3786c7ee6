"""From ids drawn one by one to text that can be printed as it comes, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class BytesDecoder(Protocol):
    """What is needed of a tokenizer."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that ids stand for."""
        ...


class TextStream:
    """Holds bytes back until their UTF-8 character is whole; bytes that never become one turn into U+FFFD.

    With stop strings, the text ends before the first of them, and what may yet become one is held back too.
    """

    def __init__(self, tokenizer: BytesDecoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = list(stop)
        self._held = ""
        self.stopped = False  # whether a stop string has come

    def push(self, id: int) -> str:
        """Text that is certain now that `id` has come; possibly empty."""
        return self._add(self._decoder.decode(self._tokenizer.decode_bytes([id])))

    def close(self) -> str:
        """What is left; a replacement character stands for a character that the text ended inside of."""
        rest = self._add(self._decoder.decode(b"", final=True))
        rest, self._held = rest + self._held, ""
        return rest

    def _add(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        kept = max(_overlap(self._held, stop) for stop in self._stop)
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
