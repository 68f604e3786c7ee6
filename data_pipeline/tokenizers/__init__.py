"""Tokenizers behind one protocol: build one from its spec, or load one from the folder that `save` wrote."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.tokenizers.base import TOKENIZER_FILE, Tokenizer
from data_pipeline.tokenizers.byte import ByteTokenizer
from data_pipeline.tokenizers.sentencepiece import MINIMUM_VOCAB_SIZE, SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "ByteTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "parse_spec",
    "train_sentencepiece",
]

_KINDS = ("byte", "sentencepiece")
_FORMS = "byte, or sentencepiece:N (N ids, for example sentencepiece:4096)"


def parse_spec(spec: str) -> tuple[str, int]:
    """Split a spec into its kind and the size of its vocabulary: "sentencepiece:4096" → ("sentencepiece", 4096).

    Raises DataError, naming the nearest valid spec.
    """
    kind, colon, size = spec.partition(":")
    if kind == "byte" and not colon:
        return "byte", ByteTokenizer.vocab_size
    if kind == "sentencepiece" and size.isascii() and size.isdigit():
        if int(size) >= MINIMUM_VOCAB_SIZE:
            return "sentencepiece", int(size)
        raise DataError(
            f"tokenizer {spec!r}: the vocabulary must have at least {MINIMUM_VOCAB_SIZE} ids "
            f"(256 bytes, the special symbols, and room to learn)"
        )
    nearest = difflib.get_close_matches(kind.lower(), _KINDS, n=1, cutoff=0.5)
    hint = {"byte": "byte", "sentencepiece": f"sentencepiece:{size if size.isdigit() else 4096}"}
    suggestion = f"; nearest: {hint[nearest[0]]}" if nearest else ""
    raise DataError(f"tokenizer {spec!r} is unknown: expected {_FORMS}{suggestion}")


def build_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer that needs no training ("byte"). DataError for the others: they come with prepared data."""
    kind, _ = parse_spec(spec)
    if kind == "byte":
        return ByteTokenizer()
    raise DataError(
        f"tokenizer {spec!r} is trained on a corpus: prepare data with --tokenizer {spec} and use the one saved there"
    )


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save(directory)` wrote.

    Raises DataError if it is missing, damaged or of an unknown kind.
    """
    path = Path(directory) / TOKENIZER_FILE
    try:
        description = json.loads(path.read_bytes())
        kind = description["kind"]
    except FileNotFoundError:
        raise DataError(f"no tokenizer in {directory}: {TOKENIZER_FILE} is missing") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if kind == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer.load(directory)
    else:
        raise DataError(f"{path}: tokenizer kind {kind!r} is unknown; this version knows {', '.join(_KINDS)}")
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise DataError(
            f"the tokenizer in {directory} is not the one that was saved: fingerprint {tokenizer.fingerprint[:12]}…, "
            f"expected {str(description.get('fingerprint'))[:12]}…; its files were changed or damaged"
        )
    return tokenizer
