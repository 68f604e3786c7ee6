"""The project's tokenizers converted to llama.cpp's, with the same ids.

Three of llama.cpp's tokenizer models are used. "gpt2" merges characters of the byte-level alphabet, "llama" merges
pieces by their score, as sentencepiece's byte-pair encoding, and "t5" finds the likeliest pieces, as its unigram model.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.sources.conversations import END_OF_TURN
from data_pipeline.tokenizers import SentencePieceTokenizer, Tokenizer
from stlm.errors import ConversionError
from stlm.export.chat import MARK, end_of_turn
from stlm.export.huggingface.fast_tokenizer import definition_of

# Pre-tokenization before characters are merged: the expression in tokenizer.json, and its name in llama.cpp.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PRE_TOKENIZERS = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _QWEN2: "qwen2"}

_UNLEARNED = 10.0  # subtracted by sentencepiece from the lowest score for a character without a piece


@dataclass(frozen=True)
class GGUFVocabulary:
    """A tokenizer of llama.cpp; `pieces`, `kinds` and `scores` have one entry for each id."""

    model: str
    pre: str
    pieces: list[str]
    kinds: list[str]  # names of gguf.TokenType
    scores: list[float] | None = None
    merges: list[str] | None = None
    unknown: int | None = None


def is_unigram(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer is sentencepiece's unigram model."""
    return isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.spec.startswith("sentencepiece:")


def vocabulary_of(tokenizer: Tokenizer) -> GGUFVocabulary:
    """Return a tokenizer's vocabulary for llama.cpp. Raises ConversionError where it has no such tokenizer."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        vocabulary = _of_sentencepiece(tokenizer)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            definition = definition_of(tokenizer, Path(scratch))
        vocabulary = _of_byte_level(tokenizer, definition)
    if tokenizer.chat_template is None:  # symbols may be typed in prompts; without chat no message can spell one out
        vocabulary.pieces[:] = [piece.removeprefix(MARK) for piece in vocabulary.pieces]
    if (turn := end_of_turn(tokenizer).single) is not None:  # as a symbol, it is left out of answers
        vocabulary.pieces[turn], vocabulary.kinds[turn] = END_OF_TURN, "CONTROL"
    return vocabulary


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> GGUFVocabulary:
    processor, ids = tokenizer._processor, range(tokenizer.vocab_size)
    pieces = [(MARK if processor.is_control(id) else "") + processor.id_to_piece(id) for id in ids]
    scores = [processor.get_score(id) for id in ids]
    kinds = [
        "UNKNOWN" if processor.is_unknown(id)
        else "CONTROL" if processor.is_control(id)
        else "BYTE" if processor.is_byte(id) else "NORMAL"
        for id in ids
    ]  # fmt: skip
    unigram = is_unigram(tokenizer)
    if unigram:  # "t5" has no byte fallback; bytes that are a character become ordinary pieces
        learned = set(pieces)
        unlearned = min(score for score, kind in zip(scores, kinds, strict=True) if kind == "NORMAL") - _UNLEARNED
        for id in ids:
            character = tokenizer.decode_bytes([id]).decode("ascii", "ignore")
            if kinds[id] == "BYTE" and character not in learned | {"", "\0", " "}:
                pieces[id], scores[id], kinds[id] = character, unlearned, "NORMAL"
    return GGUFVocabulary("t5" if unigram else "llama", "default", pieces, kinds, scores, unknown=processor.unk_id())


def _of_byte_level(tokenizer: Tokenizer, definition: dict[str, Any]) -> GGUFVocabulary:
    model = definition["model"]
    pre = _pre_tokenizer_name(definition) if model["type"] == "BPE" and not model.get("byte_fallback") else None
    if pre is None:
        raise ConversionError(
            f"data.tokenizer: got {tokenizer.spec}, which llama.cpp cannot express with the same ids, expected byte, "
            "sentencepiece:N, sentencepiece-bpe:N, or hf:DIR with byte-level pairs, cut as GPT-2, Llama 3 or Qwen2 cut"
        )
    pieces = [f"<|unused {id}|>" for id in range(tokenizer.vocab_size)]
    kinds = ["UNUSED"] * tokenizer.vocab_size
    for piece, id in model["vocab"].items():
        pieces[id], kinds[id] = piece, "NORMAL" if tokenizer.bytes_per_id[id] else "UNUSED"
    for token in definition["added_tokens"]:
        pieces[token["id"]] = token["content"]
        kinds[token["id"]] = "CONTROL" if token["special"] else "USER_DEFINED"
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return GGUFVocabulary("gpt2", pre, pieces, kinds, merges=merges or [_NO_MERGE])


_NO_MERGE = "<|start|> <|start|>"  # llama.cpp requires a non-empty list; this pair occurs in no text


def _pre_tokenizer_name(definition: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer; None where it has none."""
    cutter = definition.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers", [cutter])
    if [step["type"] for step in steps if step] == ["ByteLevel"]:
        return "gpt-2" if steps[0].get("use_regex", True) or not definition["model"]["merges"] else None
    if [step["type"] for step in steps if step] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        return _PRE_TOKENIZERS.get(steps[0]["pattern"].get("Regex", "")) if isolated else None
    return None
