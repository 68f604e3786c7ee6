"""The byte tokenizer: an id is a byte of UTF-8.

UTF-8 never uses the bytes 0xC0, 0xC1 and 0xF5 to 0xFF (RFC 3629, section 1), so the special symbols are among them, and
the vocabulary is exactly 256. Those thirteen ids stand for no text.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizers.base import (
    END_OF_STORED_DOCUMENT,
    Ids,
    checked_ids,
    fingerprint,
    save_description,
    utf8,
)


class ByteTokenizer:
    """A tokenizer with 256 ids, without training, lossless on every text."""

    chat_template: str | None = None
    spec = "byte"
    vocab_size = 256
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    start_id = 0xFC
    mask_id = 0xFD
    pad_id = 0xFE
    end_of_text_id = END_OF_STORED_DOCUMENT

    def __init__(self) -> None:
        self.bytes_per_id: NDArray[np.int32] = np.ones(256, dtype=np.int32)
        self.bytes_per_id[[0xC0, 0xC1, *range(0xF5, 0x100)]] = 0
        specials = {
            "start": self.start_id,
            "mask": self.mask_id,
            "pad": self.pad_id,
            "end_of_text": self.end_of_text_id,
        }
        self.fingerprint = fingerprint({"kind": "byte", "version": 1, **specials})

    def encode(self, text: str) -> NDArray[np.uint8]:
        return np.frombuffer(utf8(text), dtype=np.uint8)

    def encode_documents(
        self, stored: NDArray[np.uint8], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return stored, lengths

    def decode(self, ids: Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        array = checked_ids(ids, self.vocab_size)
        return array[self.bytes_per_id[array] == 1].astype(np.uint8).tobytes()

    def save(self, directory: str | os.PathLike[str]) -> None:
        save_description(self, "byte", directory)
