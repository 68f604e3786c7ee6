"""Chat templates as other programs render them, and how a turn ends for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sources.conversations import END_OF_TURN
from data_pipeline.tokenizers import Tokenizer

MARK = "\x02"  # begins the names of symbols in exported tokenizers; no message may hold it, and hardly any text does

# In front of a conversation a model reads where a sequence begins, and where a document does; its own template knows of
# no symbols. A message that spells one out is refused: programs that render templates take it for the symbol.
_BEGINNING = (
    "{%- for message in messages %}{%- if message['content'] is string and '\\x02<' in message['content'] %}"
    "{{- raise_exception('a message spells out a symbol: U+0002 followed by <') }}{%- endif %}{%- endfor %}"
    "{{- bos_token + eos_token }}{%- set bos_token = '' %}{%- set eos_token = '' %}"
)


def exported_template(template: str) -> str:
    """The template of a model, for programs that encode what it renders as it stands."""
    return _BEGINNING + template


def spelled_out(template: str) -> str:
    """The same with control characters instead of their escapes, which llama.cpp does not read."""
    return re.sub(r"\\x([01][0-9a-fA-F])", lambda found: chr(int(found[1], 16)), template)


def own_template(template: str) -> str:
    """The template of which `exported_template` made this one."""
    return template.removeprefix(_BEGINNING)


def is_exported(file: Path) -> bool:
    """Whether a file holds a template that `exported_template` made."""
    return file.is_file() and file.read_text(encoding="utf-8").startswith(_BEGINNING)


@dataclass(frozen=True)
class EndOfTurn:
    """How ids tell that an answer has ended: with one of `ids`, or where a text with `strings` stands within one."""

    ids: list[int]
    strings: list[str]
    single: int | None  # the one id that is the end of a turn and nothing else, if no other id holds it


def end_of_turn(tokenizer: Tokenizer) -> EndOfTurn:
    """Of a tokenizer whose model has learned conversations; nothing of another."""
    if tokenizer.chat_template is None:
        return EndOfTurn([], [], None)
    end = END_OF_TURN.encode()
    pieces = {id: tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size) if tokenizer.bytes_per_id[id]}
    ids = [id for id, piece in pieces.items() if piece.startswith(end)]
    within = any(end in piece[1:] for piece in pieces.values())
    single = ids[0] if len(ids) == 1 and pieces[ids[0]] == end and not within else None
    return EndOfTurn(ids, [END_OF_TURN] if within or not ids else [], single)
