"""The project's tokenizers converted to files of the `tokenizers` library, with the same ids."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.sources.conversations import END_OF_TURN
from data_pipeline.tokenizers import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from data_pipeline.tokenizers.base import SPACE
from data_pipeline.tokenizers.huggingface import DEFINITION_FILE
from stlm.export.chat import MARK

_SYMBOL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SPECIALS = ("start", "end_of_text", "pad", "mask")


def is_marked(tokenizer: Tokenizer) -> bool:
    """Return whether exported symbols get names that no text contains by chance, so that they are recognised in texts.

    Tokenizers of the `tokenizers` library keep their symbols' names, and texts that spell them out are read as text,
    unless there is a chat template, which has to name symbols.
    """
    return not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat_template is not None


def definition_of(tokenizer: Tokenizer, scratch: Path, end_of_turn: int | None = None) -> dict[str, Any]:
    """Return a tokenizer.json with the ids of `tokenizer`. It puts the start and end_of_text symbols before a text, as
    a model reads them at the beginning of a document. `scratch`: an empty folder. `end_of_turn`: an id that becomes a
    symbol, so that decoding omits it from answers.
    """
    if isinstance(tokenizer, ByteTokenizer):
        definition = _of_bytes(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        definition = _of_sentencepiece(tokenizer)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        tokenizer.save(scratch)
        definition = json.loads((scratch / DEFINITION_FILE).read_bytes())
    if is_marked(tokenizer):
        _mark(definition)
    if end_of_turn is not None and (not isinstance(tokenizer, HuggingFaceTokenizer) or is_byte_level(definition)):
        _rename(definition, {end_of_turn: END_OF_TURN})
        definition["added_tokens"].append({"id": end_of_turn, "content": END_OF_TURN, **_SYMBOL})
    names = {token["id"]: token["content"] for token in definition["added_tokens"]}
    front = [(names[id], id) for id in (tokenizer.start_id, tokenizer.end_of_text_id)]
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*({"SpecialToken": {"id": name, "type_id": 0}} for name, _ in front), _text("A")],
        "pair": [*({"SpecialToken": {"id": name, "type_id": 0}} for name, _ in front), _text("A"), _text("B")],
        "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in front},
    }
    return definition


def _mark(definition: dict[str, Any]) -> None:
    """Prefix the names of all symbols with MARK."""
    symbols = [token for token in definition["added_tokens"] if token["special"]]
    _rename(definition, {token["id"]: f"{MARK}{token['content'].removeprefix(MARK)}" for token in symbols})


def unmarked(definition: dict[str, Any]) -> dict[str, Any]:
    """Undo the changes that `definition_of` makes to a byte-level definition for chats."""
    turns = [token["id"] for token in definition["added_tokens"] if token["content"] == END_OF_TURN]
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] not in turns]
    _rename(definition, {token["id"]: token["content"].removeprefix(MARK) for token in definition["added_tokens"]})
    _rename(definition, dict.fromkeys(turns, _byte_letters()[ord(END_OF_TURN)]))
    return definition


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Return whether pieces are written in the byte-level alphabet."""
    return '"ByteLevel"' in json.dumps(definition.get("decoder"))


def _byte_letters() -> dict[int, str]:
    """Return the byte-level alphabet: the character of each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _rename(definition: dict[str, Any], names: dict[int, str]) -> None:
    """Rename ids in the model's table and among the added tokens."""
    model = definition["model"]
    old = {token["id"]: token["content"] for token in definition["added_tokens"]}
    for token in definition["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    for id, name in names.items():
        if model.get("unk_token") is not None and model["unk_token"] == old.get(id):
            model["unk_token"] = name
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(id, piece), score] for id, (piece, score) in enumerate(model["vocab"])]
    else:
        model["vocab"] = {names.get(id, piece): id for piece, id in model["vocab"].items()}


def special_names(tokenizer: Tokenizer, definition: dict[str, Any]) -> dict[str, str]:
    """Return the exported name of each of SPECIALS."""
    names = {token["id"]: token["content"] for token in definition["added_tokens"]}
    return {special: names[getattr(tokenizer, f"{special}_id")] for special in SPECIALS}


def _text(id: str) -> dict[str, Any]:
    return {"Sequence": {"id": id, "type_id": 0}}


def _frame(model: dict[str, Any], added: dict[int, str], **parts: Any) -> dict[str, Any]:
    tokens = [{"id": id, "content": content, **_SYMBOL} for id, content in sorted(added.items())]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": tokens, **parts, "model": model}


def _of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Return BPE without merges over the byte-level alphabet, whose characters have the ids of their bytes."""
    added = {getattr(tokenizer, f"{special}_id"): f"<|{special}|>" for special in SPECIALS}
    vocabulary = {added.get(byte, character): byte for byte, character in sorted(_byte_letters().items())}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False, "ignore_merges": False}
    parts = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _frame(model, added, pre_tokenizer=parts, decoder=parts)


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the same pieces with scores or merges. Text that spells out a byte or a symbol is read as text."""
    processor = tokenizer._processor
    is_unigram = tokenizer.spec.startswith("sentencepiece:")
    model = _unigram(tokenizer) if is_unigram else _bpe(tokenizer)
    added = {id: processor.id_to_piece(id) for id in range(tokenizer.vocab_size) if tokenizer.bytes_per_id[id] == 0}
    decoder = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return _frame(
        {**model, "byte_fallback": True},
        added,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        pre_tokenizer=_apart(tokenizer) if is_unigram else None,
        decoder={"type": "Sequence", "decoders": decoder},
    )


def _unwritten(tokenizer: SentencePieceTokenizer) -> list[bool]:
    """Return for each id whether it is a byte or a symbol rather than a learned piece."""
    return [tokenizer._processor.is_byte(id) or tokenizer.bytes_per_id[id] == 0 for id in range(tokenizer.vocab_size)]


def _unigram(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the unigram model. Unknown text scores 10 below the worst of all pieces. sentencepiece excludes bytes and
    symbols from that minimum, so they get the score of the worst learned piece."""
    processor, unwritten = tokenizer._processor, _unwritten(tokenizer)
    worst = min(processor.get_score(id) for id in range(tokenizer.vocab_size) if not unwritten[id])
    vocabulary = [
        [processor.id_to_piece(id), worst if unwritten[id] else processor.get_score(id)]
        for id in range(tokenizer.vocab_size)
    ]
    return {"type": "Unigram", "unk_id": processor.unk_id(), "vocab": vocabulary}


def _apart(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return a pre-tokenizer that splits text spelling out a byte or a symbol, at a place where no learned piece is
    split."""
    unwritten = _unwritten(tokenizer)
    pieces = [tokenizer._processor.id_to_piece(id) for id in range(tokenizer.vocab_size)]
    learned = [piece for piece, is_unwritten in zip(pieces, unwritten, strict=True) if not is_unwritten]
    within = {piece[place : place + 2] for piece in learned for place in range(len(piece) - 1)}
    places = []
    for piece in (piece for piece, is_unwritten in zip(pieces, unwritten, strict=True) if is_unwritten):
        cut = next((cut for cut in range(1, len(piece)) if piece[cut - 1 : cut + 1] not in within), 1)
        places.append(f"{re.escape(piece[:cut])}(?={re.escape(piece[cut:])})")
    return {"type": "Split", "pattern": {"Regex": "|".join(places)}, "behavior": "MergedWithPrevious", "invert": False}


def _bpe(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Return the BPE model. sentencepiece joins two neighbours that spell a piece, the best piece first: each split of
    a piece into two pieces is a merge, and merges are ordered by the score of the joined piece."""
    processor, unwritten = tokenizer._processor, _unwritten(tokenizer)
    pieces = [processor.id_to_piece(id) for id in range(tokenizer.vocab_size)]
    learned = {piece: id for id, piece in enumerate(pieces) if not unwritten[id]}
    merges: list[tuple[float, int, int, list[str]]] = []
    for piece, id in learned.items():
        for left, right in ((piece[:place], piece[place:]) for place in range(1, len(piece))):
            if left in learned and right in learned:
                merges.append((-processor.get_score(id), learned[left], learned[right], [left, right]))
    return {
        "type": "BPE",
        "unk_token": pieces[processor.unk_id()],
        "fuse_unk": False,
        "ignore_merges": False,
        "vocab": {piece: id for id, piece in enumerate(pieces)},
        "merges": [pair for *_, pair in sorted(merges)],
    }
