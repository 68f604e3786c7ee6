"""Chat templates for other programs, and the ids and strings that end a turn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sources.conversations import END_OF_TURN
from data_pipeline.tokenizers import Tokenizer

MARK = "\x02"  # begins the names of symbols in exported tokenizers; rare in texts, refused in messages before "<"

# A conversation follows the symbols for the beginning of a sequence and of a document; the model's own template has no
# symbols. A message that spells one out is refused: programs that render templates would read it as the symbol.
_BEGINNING = (
    "{%- for message in messages %}{%- if message['content'] is string and '\\x02<' in message['content'] %}"
    "{{- raise_exception('a message spells out a symbol: U+0002 followed by <') }}{%- endif %}{%- endfor %}"
    "{{- bos_token + eos_token }}{%- set bos_token = '' %}{%- set eos_token = '' %}"
)


def exported_template(template: str) -> str:
    """Return a model's template for programs that encode the rendered text without adding symbols."""
    return _BEGINNING + template


def unescape_controls(template: str) -> str:
    """Return the template with control characters in place of their escapes, which llama.cpp does not support."""
    return re.sub(r"\\x([01][0-9a-fA-F])", lambda found: chr(int(found[1], 16)), template)


def original_template(template: str) -> str:
    """Return the template from which `exported_template` made this one."""
    return template.removeprefix(_BEGINNING)


def is_exported(file: Path) -> bool:
    """Return whether a file holds a template made by `exported_template`."""
    return file.is_file() and file.read_text(encoding="utf-8").startswith(_BEGINNING)


@dataclass(frozen=True)
class EndOfTurn:
    """The ids and strings that end an answer. Strings are needed where the end of turn may begin within an id."""

    ids: list[int]
    strings: list[str]
    single: int | None  # the id that is exactly the end of a turn, if no other id contains it


def end_of_turn(tokenizer: Tokenizer) -> EndOfTurn:
    """Return the ends of turns for a tokenizer with a chat template; empty for one without."""
    if tokenizer.chat_template is None:
        return EndOfTurn([], [], None)
    end = END_OF_TURN.encode()
    pieces = {id: tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size) if tokenizer.bytes_per_id[id]}
    ids = [id for id, piece in pieces.items() if piece.startswith(end)]
    within = any(end in piece[1:] for piece in pieces.values())
    single = ids[0] if len(ids) == 1 and pieces[ids[0]] == end and not within else None
    return EndOfTurn(ids, [END_OF_TURN] if within or not ids else [], single)
