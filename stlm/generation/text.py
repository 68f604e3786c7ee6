"""From ids drawn one by one to text that can be printed as it comes."""

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
    """Holds bytes back until their UTF-8 character is whole; bytes that never become one turn into U+FFFD."""

    def __init__(self, tokenizer: BytesDecoder) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Text that is complete now that `id` has come; possibly empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([id]))

    def close(self) -> str:
        """What is left: a replacement character if the text ended inside a character."""
        return self._decoder.decode(b"", final=True)
