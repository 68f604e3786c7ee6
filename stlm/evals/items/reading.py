"""Multiple-choice items and minimal pairs, read from JSON Lines and checked against the schema.

An item is {"id": text, "context": text, "choices": [text, …], "answer": index of the truth}. A minimal pair has BLiMP's
format: {"sentence_good": text, "sentence_bad": text, "UID": paradigm, "linguistics_term": phenomenon, "pairID": text}.
Other fields are ignored. docs/evals_reference.md shows one of each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.sources.formats import COMPRESSED, open_input

BLANK = "_"  # marks the place of the choice in a context


@dataclass(frozen=True)
class Item:
    """One question: a context and choices that follow it or fill its blank, one of them true."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int  # index of the truth in `choices`
    groups: dict[str, str] = field(default_factory=dict)  # groups by kind, such as {"phenomenon": "binding"}
    passage: str | None = None  # its passage, if it shares one with other items: they are not independent
    place: str = field(default="", compare=False)  # file:line, for messages


Sampled = TypeVar("Sampled")


def sample_items(items: Sequence[Sampled], number: int | None) -> list[Sampled]:
    """Return `number` of the items, or all, in their order: those whose contents have the smallest hashes. The choice
    does not depend on the order of the file, and a larger sample includes a smaller one."""
    if number is None or number >= len(items):
        return list(items)
    places = sorted(range(len(items)), key=lambda place: _hash_of(items[place]))
    return [items[place] for place in sorted(places[:number])]


def _hash_of(item: Any) -> bytes:
    """Return the hash of an item's contents, without its place in a file."""
    compared = [getattr(item, one.name) for one in fields(item) if one.compare] if is_dataclass(item) else item
    return hashlib.sha256(repr(compared).encode()).digest()


def json_sha256(values: Iterable[Any]) -> str:
    """Return the sha256 of values, each as a line of JSON. It does not depend on a file's compression."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


Parse = Callable[[dict[str, Any]], Item]


class HasId(Protocol):
    """An object with an id, read from one line of a file."""

    @property
    def id(self) -> str: ...


Read = TypeVar("Read", bound=HasId)


def task_file(tasks_dir: str | os.PathLike[str] | None, name: str) -> Path:
    """Return the path of NAME.jsonl in a folder, compressed or not. Raises DataError where there is not exactly one."""
    wanted = f"{name}.jsonl"
    endings = f"or {wanted}{f', {wanted}'.join(COMPRESSED)}"
    if tasks_dir is None:
        raise DataError(
            f"{name}: its items are in no folder; expected --tasks-dir DIR with DIR/{wanted} ({endings}); "
            "in training, evals.tasks_dir=DIR"
        )
    found = [path for suffix in ("", *COMPRESSED) if (path := Path(tasks_dir, wanted + suffix)).is_file()]
    if not found:
        raise DataError(
            f"{name}: no items; put them into {Path(tasks_dir, wanted)} ({endings}), see docs/evals_reference.md"
        )
    if len(found) > 1:
        raise DataError(f"{name}: got {' and '.join(map(str, found))}, expected one of them; remove the others")
    return found[0]


def read_items(path: Path, parse: Callable[[dict[str, Any]], Read]) -> list[Read]:
    """Read all items of a file. Raises DataError, with file:line and field, where one breaks the schema or there are
    none."""
    return parse_items(((f"{path}:{number}", line) for number, line in _lines(path)), parse, str(path))


def parse_items(
    records: Iterable[tuple[str, bytes | dict[str, Any]]], parse: Callable[[dict[str, Any]], Read], source: str
) -> list[Read]:
    """Parse records, given as objects or as JSON, each with its place. `source`: their file or data set, for messages.

    Raises DataError where a record breaks the schema, an id repeats or there are no items.
    """
    items: list[Read] = []
    places: dict[str, str] = {}
    for place, record in records:
        try:
            item = parse(_object(record) if isinstance(record, bytes) else _check_unicode(record))
            if item.id in places:
                raise DataError(f"id: got {item.id!r} again, as in {places[item.id]}; expected a new one")
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        places[item.id] = place
        items.append(replace(item, place=place) if isinstance(item, Item) else item)
    if not items:
        raise DataError(f"{source}: holds no items")
    return items


def choice_item(record: dict[str, Any]) -> Item:
    """Parse an item with two or more choices. Raises DataError where it breaks the schema."""
    item = _item(record)
    if len(item.choices) < 2:
        raise DataError(f"choices: got {len(item.choices)}, expected two or more")
    return item


def target_item(record: dict[str, Any]) -> Item:
    """Parse an item whose only choice is the text to predict. Raises DataError where it breaks the schema."""
    item = _item(record)
    if len(item.choices) != 1:
        raise DataError(f"choices: got {len(item.choices)}, expected one: the text that follows")
    return item


def blank_item(record: dict[str, Any]) -> Item:
    """Parse an item whose context has one blank and text after it, by which choices are compared. Raises DataError."""
    item = choice_item(record)
    parts = item.context.split(BLANK)
    if len(parts) != 2 or not parts[1].strip():
        raise DataError(f'context: got {item.context!r}, expected one "{BLANK}" for the choices, and text after it')
    return item


def minimal_pair(record: dict[str, Any]) -> Item:
    """Parse a minimal pair: a correct sentence and an incorrect one. Raises DataError where it breaks the schema."""
    good, bad = text_field(record, "sentence_good"), text_field(record, "sentence_bad")
    paradigm, phenomenon = text_field(record, "UID"), text_field(record, "linguistics_term")
    groups = {"phenomenon": phenomenon, "paradigm": paradigm}
    return Item(f"{paradigm}-{text_field(record, 'pairID')}", "", (good, bad), 0, groups)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    compression = path.suffix if path.suffix in COMPRESSED else ""
    with open_input(str(path), compression) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, line


def _object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}; convert the file first") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"expected an object, got {type(record).__name__}")
    return _check_unicode(record) if b"\\u" in line else record  # a lone surrogate needs an escape


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise DataError(f"{twice}: given twice, expected once")
    return record


def _check_unicode(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record. Raises DataError, naming the field, where text holds a lone surrogate."""
    for name, value in record.items():
        try:
            json.dumps([name, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise DataError(
                f"{name.encode(errors='replace').decode()}: holds the lone surrogate U+{code:04X}, which is no "
                "character; expected text"
            ) from None
    return record


def _item(record: dict[str, Any]) -> Item:
    choices = required_field(record, "choices")
    if not isinstance(choices, list):
        raise DataError(f"choices: expected a list of texts, got {choices!r}")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"choices[{index}]: expected a text that is not empty, got {choice!r}")
    answer = required_field(record, "answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(f"answer: got {answer!r}, expected 0 to {len(choices) - 1}, the index of the true choice")
    groups = {"subject": text_field(record, "subject")} if "subject" in record else {}
    texts = tuple(choice.strip() for choice in choices)
    return Item(text_field(record, "id"), text_field(record, "context").strip(), texts, answer, groups)


def text_field(record: dict[str, Any], name: str) -> str:
    """Return a field that is non-empty text. Raises DataError, naming the field."""
    value = required_field(record, name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name}: expected a text that is not empty, got {value!r}")
    return value


def number_field(record: dict[str, Any], name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Return a field that is a number within limits. Raises DataError, naming the field."""
    value = required_field(record, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and low <= value <= high and abs(value) <= sys.float_info.max):  # JSON's integers are unbounded
        limits = "" if math.isinf(low) else f" from {low:g} to {high:g}"
        raise DataError(f"{name}: got {value!r}, expected a number{limits}")
    return float(value)


def required_field(record: dict[str, Any], name: str) -> Any:
    """Return a required field. Raises DataError, listing the fields that are present."""
    if name not in record:
        raise DataError(f"{name}: missing; the fields are: {', '.join(map(str, list(record)[:10]))}")
    return record[name]
