"""Incremental decoding of ids to printable text, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol


class BytesDecoder(Protocol):
    """Interface of the tokenizers that `TextStream` decodes with."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that ids stand for."""
        ...


class TextStream:
    """Text stream that holds bytes back until their UTF-8 character is complete; invalid bytes become U+FFFD.

    With stop strings, the text ends before the first of them; text that may become one is held back as well.
    """

    def __init__(self, tokenizer: BytesDecoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = list(stop)
        self._held = ""
        self.stopped = False  # whether a stop string was found

    def push(self, id: int) -> str:
        """Add an id; return the text that is certain now, possibly empty."""
        return self._add(self._decoder.decode(self._tokenizer.decode_bytes([id])))

    def close(self) -> str:
        """End the text and return the rest; an incomplete last character becomes a replacement character."""
        rest = self._add(self._decoder.decode(b"", final=True))
        rest, self._held = rest + self._held, ""
        return rest

    def decode(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as they arrive, up to a stop string."""
        for id in ids:
            yield self.push(id)
            if self.stopped:
                return
        yield self.close()

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
    """Return the number of characters at the end of `text` that may begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
