"""The protocol of all tokenizers, and the functions that they share.

Stored text: during preparation, documents are stored one after another as UTF-8, each followed by one byte 0xFF, which
UTF-8 never uses. `encode_documents` converts such a sequence to ids at once; for the byte tokenizer it already is the
ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.atomic import write_text

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"  # the name that transformers uses
END_OF_STORED_DOCUMENT = 0xFF
SPACE = "\u2581"  # the space of sentencepiece and similar libraries

# Scores are summed in 32 bits, and some encoders slow down on long text, so encoders that process a text as a whole
# get segments of at most 65,536 characters, which end at line ends if there are any.
SEGMENT = 65_536
_SEGMENTS = re.compile(rf"(?s).{{1,{SEGMENT}}}(?:\n+|\Z)|.{{1,{SEGMENT}}}")

Ids = NDArray[Any] | Sequence[int]


class Tokenizer(Protocol):
    """Lossless conversion of text to ids and back.

    The four special ids stand for no text: `start_id` precedes a sequence, `end_of_text_id` follows each document,
    `pad_id` fills a batch, `mask_id` hides an id. `encode` never produces them.
    """

    spec: str  # the user's name for it: "byte", "sentencepiece:4096"
    vocab_size: int
    dtype: np.dtype[Any]  # of ids on disk
    start_id: int
    end_of_text_id: int
    pad_id: int
    mask_id: int
    bytes_per_id: NDArray[np.int32]  # [V], the bytes of text that each id stands for; 0 for special ids
    fingerprint: str  # sha256 in hex of all that defines the mapping between text and ids
    chat_template: str | None  # Jinja: the format of conversations that models of these ids have learned

    def encode(self, text: str) -> NDArray[Any]:
        """Return the ids of `text`, without special ids.

        Raises DataError if `text` contains a lone surrogate, which UTF-8 cannot express.
        """
        ...

    def encode_documents(
        self, stored: NDArray[np.uint8], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Encode whole documents, each followed by end_of_text.

        `stored`: UTF-8, one 0xFF after each document. `lengths`: bytes of each document, the 0xFF included. Return the
        ids of all documents in sequence, and the number of ids of each, end_of_text included.
        """
        ...

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids`. Special ids are left out; bytes that are not valid UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the exact bytes of `ids`, `bytes_per_id[ids].sum()` of them."""
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, and any other files that it needs, into `directory`."""
        ...


def utf8(text: str) -> bytes:
    """Return `text` as UTF-8. Raises DataError if it contains a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
            f"which is not valid Unicode text; replace it, for example with U+FFFD"
        ) from None


def segments(text: str) -> Iterator[str]:
    """Return `text` in pieces that an encoder processes in one call."""
    return (match[0] for match in _SEGMENTS.finditer(text))


def checked_ids(ids: Ids, vocab_size: int) -> NDArray[np.int64]:
    """Return `ids` as a flat int64 array. Raises DataError if one is outside the vocabulary."""
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise DataError(f"id {wrong} is outside the vocabulary of {vocab_size} ids")
    return array


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest integer type for ids on disk.

    uint16 is not used: DeepSpeed writes it with the format's type code 6, Megatron-LM with 8, and each reads the
    other's code as another type. int16 and int32 have the same code in all.
    """
    if vocab_size <= 256:
        return np.dtype(np.uint8)
    return np.dtype(np.int16 if vocab_size <= 1 << 15 else np.int32)


def fingerprint(definition: dict[str, Any], data: bytes = b"") -> str:
    """Return the sha256 of a canonical form of a tokenizer's definition."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode() + b"\0" + data).hexdigest()


def save_description(tokenizer: Tokenizer, kind: str, directory: str | os.PathLike[str]) -> None:
    """Write tokenizer.json: a description of the tokenizer, for people and for `load_tokenizer`."""
    description = {
        "kind": kind,
        "spec": tokenizer.spec,
        "vocab_size": tokenizer.vocab_size,
        "start_id": tokenizer.start_id,
        "end_of_text_id": tokenizer.end_of_text_id,
        "pad_id": tokenizer.pad_id,
        "mask_id": tokenizer.mask_id,
        "fingerprint": tokenizer.fingerprint,
    }
    if tokenizer.chat_template is not None:
        write_text(Path(directory) / TEMPLATE_FILE, tokenizer.chat_template)
    write_text(Path(directory) / TOKENIZER_FILE, json.dumps(description, indent=2) + "\n")
