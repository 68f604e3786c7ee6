"""Tokenizers with one protocol: build one from its spec, or load one from the folder that `save` wrote."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.tokenizers.base import TEMPLATE_FILE, TOKENIZER_FILE, Tokenizer
from data_pipeline.tokenizers.byte import ByteTokenizer
from data_pipeline.tokenizers.huggingface import HuggingFaceTokenizer, build_huggingface
from data_pipeline.tokenizers.sentencepiece import (
    ALGORITHMS,
    MINIMUM_VOCAB_SIZE,
    SentencePieceTokenizer,
    train_sentencepiece,
)

__all__ = [
    "ALGORITHMS",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "find_tokenizer",
    "load_tokenizer",
    "parse_spec",
    "train_sentencepiece",
]

_FORMS = {
    "byte": "byte",
    "sentencepiece": "sentencepiece:4096",
    "sentencepiece-bpe": "sentencepiece-bpe:4096",
    "hf": "hf:DIR",
}
# Other names of these, in programs and papers.
_ALSO_CALLED = {
    **dict.fromkeys(("bytes", "byte-level", "utf8", "utf-8", "char", "character", "characters", "none"), "byte"),
    **dict.fromkeys(("unigram", "sp", "spm", "sentencepiece-unigram", "unigram-sentencepiece", "ulm"), "sentencepiece"),
    **dict.fromkeys(("bpe", "sp-bpe", "spm-bpe", "bpe-sentencepiece", "byte-pair", "bbpe"), "sentencepiece-bpe"),
    **dict.fromkeys(("huggingface", "hugging-face", "transformers", "tokenizers", "pretrained"), "hf"),
}
_EXPECTED = (
    "byte, sentencepiece:N or sentencepiece-bpe:N (N ids, for example sentencepiece:4096), "
    "or hf:DIR (a folder with a tokenizer.json of Hugging Face)"
)


def parse_spec(spec: str) -> tuple[str, int]:
    """Split a spec into its kind and the size of its vocabulary: "sentencepiece:4096" → ("sentencepiece", 4096).

    The size of "hf:DIR" is in the folder, so 0 is returned. Raises DataError, naming the nearest valid spec.
    """
    kind, colon, size = spec.partition(":")
    if kind == "byte" and not colon:
        return "byte", ByteTokenizer.vocab_size
    if kind == "hf" and size:
        return "hf", 0
    if kind in ALGORITHMS and size.isascii() and size.isdigit():
        if len(size.lstrip("0")) > 9:
            raise DataError(f"tokenizer {spec!r}: the vocabulary must have fewer than 1,000,000,000 ids")
        if int(size) >= MINIMUM_VOCAB_SIZE:
            return kind, int(size)
        raise DataError(
            f"tokenizer {spec!r}: the vocabulary must have at least {MINIMUM_VOCAB_SIZE} ids "
            f"(256 bytes, the special symbols, and room to learn)"
        )
    nearest = nearest_spec(spec)
    raise DataError(f"tokenizer {spec!r} is unknown: expected {_EXPECTED}{f'; nearest: {nearest}' if nearest else ''}")


def nearest_spec(spec: str) -> str | None:
    """Return the valid spec that was probably meant: "bpe:8k" → "sentencepiece-bpe:8000"; None if it resembles none."""
    if Path(spec).name == "tokenizer.json" or (Path(spec) / "tokenizer.json").is_file():
        return f"hf:{spec}"
    match = re.fullmatch(r"(?P<name>.*?)[:=_ -]*(?P<size>\d[\d,._]*)?(?P<thousands>k?)", spec.strip().lower())
    assert match is not None  # every part may be empty
    name = re.sub(r"[\s_-]+", "-", match["name"].partition(":")[0])
    size = re.sub(r"\D", "", match["size"] or "")
    size = f"{size}000" if size and match["thousands"] else size
    if not name and size:
        kind = "sentencepiece"
    elif name in _ALSO_CALLED:
        kind = _ALSO_CALLED[name]
    else:
        close = difflib.get_close_matches(name, [*_FORMS, *_ALSO_CALLED], n=1, cutoff=0.6)
        if not close:
            return None
        kind = _ALSO_CALLED.get(close[0], close[0])
    form = _FORMS[kind]
    fits = size and MINIMUM_VOCAB_SIZE <= int(size) < 1_000_000_000
    return form.replace("4096", size) if fits else form


def build_tokenizer(spec: str = "byte") -> Tokenizer:
    """Build a tokenizer that needs no training ("byte", "hf:DIR"). Raises DataError for others, which prepared data
    contains.
    """
    kind, _ = parse_spec(spec)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "hf":
        return build_huggingface(spec.partition(":")[2], spec)
    raise DataError(
        f"tokenizer {spec!r} is trained on a corpus: prepare data with --tokenizer {spec} and use the one saved there"
    )


def find_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of prepared data, of a model, a checkpoint or a run (its newest complete checkpoint).

    Raises DataError if there is none, or it is damaged.
    """
    path = Path(path)
    complete = sorted(path.glob("checkpoints/step_*/COMPLETE"))
    places = [path, path / "tokenizer", path / "model/tokenizer"]
    places += [complete[-1].parent / "model/tokenizer"] if complete else []
    for place in places:
        if (place / TOKENIZER_FILE).is_file():
            return load_tokenizer(place)
    raise DataError(f"no tokenizer in {path}: expected a folder of prepared data, a model, a checkpoint or a run")


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer that `Tokenizer.save(directory)` wrote.

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
    elif kind in ALGORITHMS:
        tokenizer = SentencePieceTokenizer.load(directory, kind)
    elif kind == "hf":
        tokenizer = HuggingFaceTokenizer.load(directory)
    else:
        raise DataError(f"{path}: tokenizer kind {kind!r} is unknown; this version knows {', '.join(_FORMS)}")
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise DataError(
            f"the tokenizer in {directory} is not the one that was saved: fingerprint {tokenizer.fingerprint[:12]}…, "
            f"expected {str(description.get('fingerprint'))[:12]}…; its files were changed or damaged"
        )
    template = Path(directory) / TEMPLATE_FILE
    tokenizer.chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    return tokenizer
