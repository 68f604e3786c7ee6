"""The project's tokenizers as files of the `tokenizers` library, with the same ids."""

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
    """Whether symbols have names there that no text spells out by chance, and are therefore recognised in texts.

    Where the tokenizer is of the `tokenizers` library, symbols keep the names that people know, and texts that spell
    them out are texts; but the templates of chats have to name them.
    """
    return not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat_template is not None


def definition_of(tokenizer: Tokenizer, scratch: Path, end_of_turn: int | None = None) -> dict[str, Any]:
    """A tokenizer.json whose ids are those of `tokenizer`; before a text it puts the start and end_of_text symbols, as
    a model reads them at the beginning of a document. `scratch` is an empty folder. The id `end_of_turn` becomes a
    symbol, which is left out of answers as others are.
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
    """Begin the names of all symbols with MARK."""
    symbols = [token for token in definition["added_tokens"] if token["special"]]
    _rename(definition, {token["id"]: f"{MARK}{token['content'].removeprefix(MARK)}" for token in symbols})


def unmarked(definition: dict[str, Any]) -> dict[str, Any]:
    """A byte-level definition as it was before `definition_of` has marked it for chats."""
    turns = [token["id"] for token in definition["added_tokens"] if token["content"] == END_OF_TURN]
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] not in turns]
    _rename(definition, {token["id"]: token["content"].removeprefix(MARK) for token in definition["added_tokens"]})
    _rename(definition, dict.fromkeys(turns, _byte_letters()[ord(END_OF_TURN)]))
    return definition


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether pieces are written in the byte-level alphabet."""
    return '"ByteLevel"' in json.dumps(definition.get("decoder"))


def _byte_letters() -> dict[int, str]:
    """The byte-level alphabet: how each byte is written."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _rename(definition: dict[str, Any], names: dict[int, str]) -> None:
    """Give ids other names, in the table of the model and among the added tokens."""
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
    """How each of SPECIALS is written there."""
    names = {token["id"]: token["content"] for token in definition["added_tokens"]}
    return {special: names[getattr(tokenizer, f"{special}_id")] for special in SPECIALS}


def _text(id: str) -> dict[str, Any]:
    return {"Sequence": {"id": id, "type_id": 0}}


def _frame(model: dict[str, Any], added: dict[int, str], **parts: Any) -> dict[str, Any]:
    tokens = [{"id": id, "content": content, **_SYMBOL} for id, content in sorted(added.items())]
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": tokens, **parts, "model": model}


def _of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """BPE without merges over the byte-level alphabet, whose characters get the ids of their bytes."""
    added = {getattr(tokenizer, f"{special}_id"): f"<|{special}|>" for special in SPECIALS}
    vocabulary = {added.get(byte, character): byte for byte, character in sorted(_byte_letters().items())}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False, "ignore_merges": False}
    parts = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _frame(model, added, pre_tokenizer=parts, decoder=parts)


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The same pieces, with scores or with merges. No text that spells out a byte or a symbol is one."""
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
    """Of each id, whether it is a byte or a symbol rather than a piece that was learned."""
    return [tokenizer._processor.is_byte(id) or tokenizer.bytes_per_id[id] == 0 for id in range(tokenizer.vocab_size)]


def _unigram(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """What is no piece costs 10 more than the worst of all pieces, so bytes and symbols, which sentencepiece leaves out
    of that, get the score of the worst one that was learned."""
    processor, unwritten = tokenizer._processor, _unwritten(tokenizer)
    worst = min(processor.get_score(id) for id in range(tokenizer.vocab_size) if not unwritten[id])
    vocabulary = [
        [processor.id_to_piece(id), worst if unwritten[id] else processor.get_score(id)]
        for id in range(tokenizer.vocab_size)
    ]
    return {"type": "Unigram", "unk_id": processor.unk_id(), "vocab": vocabulary}


def _apart(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """Cuts text that spells out a byte or a symbol, so that it is not taken for one, where no learned piece is cut."""
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
    """sentencepiece joins two neighbours where what they spell is a piece, the best piece first: each way in which a
    piece can be put together from two is a merge, and they are ordered by the piece that they make."""
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
