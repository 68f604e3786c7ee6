"""Subwords by the sentencepiece library (Kudo and Richardson 2018, arXiv 1808.06226), made lossless: unigram (Kudo
2018, arXiv 1804.10959) and byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909).

Text is unchanged: no normalisation, no added or removed spaces, and byte pieces for text that was not learned. The
library has one collision: it writes a space as U+2581, so a real U+2581 would be decoded as a space. Here text is cut
at U+2581, which is encoded as its three bytes, and ids are decoded by a table of the bytes of each piece.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.atomic import write_bytes
from data_pipeline.tokenizers.base import (
    SEGMENT,
    SPACE,
    Ids,
    checked_ids,
    fingerprint,
    id_dtype,
    save_description,
    segments,
    utf8,
)

MODEL_FILE = "sentencepiece.model"
MINIMUM_VOCAB_SIZE = 262  # specials, bytes, and one learned piece

# The algorithm that learns the vocabulary, by the kind in a spec.
ALGORITHMS = {"sentencepiece": "unigram", "sentencepiece-bpe": "bpe"}

# Specials first, then the 256 bytes, then the learned pieces. The library requires the unknown symbol, which is never
# produced.
_UNKNOWN, _START, _END_OF_TEXT, _PAD, _MASK = range(5)
_SEGMENTS_AT_A_TIME = 16  # of a long text; the library keeps the results of a whole call in memory
_SENTENCE = 4096  # characters passed to the trainer at a time


class SentencePieceTokenizer:
    """A trained sentencepiece model of exactly `vocab_size` ids, bytes and specials included."""

    chat_template: str | None = None
    start_id = _START
    end_of_text_id = _END_OF_TEXT
    pad_id = _PAD
    mask_id = _MASK

    def __init__(self, model: bytes, kind: str = "sentencepiece") -> None:
        """model: a serialised sentencepiece model made by `train_sentencepiece`. kind: a key of ALGORITHMS.

        Raises DataError if it is something else.
        """
        from sentencepiece import SentencePieceProcessor

        self._model = model
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"not a sentencepiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self._kind = kind
        self.spec = f"{kind}:{self.vocab_size}"
        self.dtype = id_dtype(self.vocab_size)
        self._bytes = [self._bytes_of(id) for id in range(self.vocab_size)]
        self.bytes_per_id: NDArray[np.int32] = np.array([len(piece) for piece in self._bytes], dtype=np.int32)
        self._byte_ids = {self._bytes[id][0]: id for id in range(self.vocab_size) if self._processor.is_byte(id)}
        if len(self._byte_ids) != 256 or [i for i in range(self.vocab_size) if not self._bytes[i]] != list(range(5)):
            raise DataError("the sentencepiece model lacks the byte pieces or special symbols that this project adds")
        self._space_ids = np.array([self._byte_ids[byte] for byte in SPACE.encode()], dtype=np.int32)
        self.fingerprint = fingerprint({"kind": kind, "version": 1}, model)

    def _bytes_of(self, id: int) -> bytes:
        if self._processor.is_control(id) or self._processor.is_unknown(id):
            return b""
        piece: str = self._processor.id_to_piece(id)
        if self._processor.is_byte(id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode("utf-8")

    def encode(self, text: str) -> NDArray[Any]:
        utf8(text)
        parts: list[NDArray[Any]] = [np.empty(0, np.int32)]
        for index, part in enumerate(text.split(SPACE)):
            if index:
                parts.append(self._space_ids)
            pieces = segments(part)
            while some := list(itertools.islice(pieces, _SEGMENTS_AT_A_TIME)):
                encoded = self._processor.encode(some, return_type="numpy", num_threads=1)
                parts += [ids.astype(self.dtype, copy=False) for ids in encoded]
        return np.concatenate(parts, dtype=self.dtype, casting="same_kind")

    def encode_documents(
        self, stored: NDArray[np.uint8], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        stops = np.cumsum(lengths)
        spans = zip(stops - lengths, stops - 1, strict=True)
        texts = [stored[start:stop].tobytes().decode("utf-8") for start, stop in spans]
        # Most texts are one segment, and the library is fastest with many at a time.
        whole = [len(text) <= SEGMENT and SPACE not in text for text in texts]
        together = [text for text, is_whole in zip(texts, whole, strict=True) if is_whole]
        encoded = iter(self._processor.encode(together, add_eos=True, return_type="numpy", num_threads=1))
        end = np.array([self.end_of_text_id], dtype=self.dtype)
        pieces = [
            next(encoded) if is_whole else np.append(self.encode(text), end)
            for text, is_whole in zip(texts, whole, strict=True)
        ]
        counts = np.fromiter(map(len, pieces), np.int64, len(pieces))
        return np.concatenate([np.empty(0, np.int32), *pieces], dtype=self.dtype, casting="same_kind"), counts

    def decode(self, ids: Ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        return b"".join([self._bytes[id] for id in checked_ids(ids, self.vocab_size).tolist()])

    def save(self, directory: str | os.PathLike[str]) -> None:
        self.save_model(directory)
        save_description(self, self._kind, directory)

    def save_model(self, directory: str | os.PathLike[str]) -> None:
        """Write only the library's model."""
        write_bytes(Path(directory) / MODEL_FILE, self._model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], kind: str) -> SentencePieceTokenizer:
        path = Path(directory) / MODEL_FILE
        try:
            return cls(path.read_bytes(), kind)
        except FileNotFoundError:
            raise DataError(f"the tokenizer in {directory} is incomplete: {MODEL_FILE} is missing") from None
        except DataError as error:
            raise DataError(f"{path} is damaged: {error}") from error


def train_sentencepiece(texts: Iterable[str], vocab_size: int, kind: str = "sentencepiece") -> SentencePieceTokenizer:
    """Learn a vocabulary of exactly `vocab_size` ids from `texts`, which are held in memory: pass a sample.

    The same texts give the same model on every machine. Raises DataError if the texts are too few, or too varied, for
    that size.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=ALGORITHMS[kind],
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=8 * _SENTENCE,  # bytes; longer ones would be left out silently
            unk_id=_UNKNOWN,
            bos_id=_START,
            eos_id=_END_OF_TEXT,
            pad_id=_PAD,
            unk_piece="<unknown>",
            bos_piece="<start>",
            eos_piece="<end_of_text>",
            pad_piece="<pad>",
            control_symbols=["<mask>"],
            num_threads=4,  # fixed: sums of floats depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_problem(str(error), kind, vocab_size)) from error
    return SentencePieceTokenizer(model.getvalue(), kind)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts in pieces that the trainer accepts.

    They are not too long, and lack the characters for which the trainer would leave a sentence out.
    """
    for text in texts:
        for part in re.split("[\\0\u2581\u2585]", text):
            for start in range(0, len(part), _SENTENCE):
                yield part[start : start + _SENTENCE]


def _training_problem(message: str, kind: str, vocab_size: int) -> str:
    """Return the library's message in words that suggest a remedy."""
    what = f"tokenizer {kind}:{vocab_size}"
    if found := re.search(r"value <= (\d+)", message):
        return f"{what}: the corpus is too small for so large a vocabulary; {kind}:{found[1]} is the largest"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{what}: the corpus has too many different characters; {kind}:{found[1]} is the smallest"
    return f"{what}: training failed: {message}"
