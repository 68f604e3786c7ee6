"""Values as JSON that names their types, for messages between processes that do not trust each other.

Unlike a pickle, such a message runs no code when it is read, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def to_plain(value: Any, other: Callable[[Any], list[Any]]) -> Any:
    """Return a value as JSON can express it: None, booleans, numbers, strings, and lists, tuples, paths and dicts with
    string keys made of them. For anything else `other` returns [kind, contents] or raises TypeError.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return ["path", str(value)]
    if type(value) in (list, tuple):
        return [type(value).__name__, [to_plain(part, other) for part in value]]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: to_plain(part, other) for key, part in value.items()}
    return other(value)


def from_plain(plain: Any, other: Callable[[str, Any], Any]) -> Any:
    """Return the value that `to_plain` was given. Raises ValueError for anything else."""
    match plain:
        case None | bool() | int() | float() | str():
            return plain
        case ["path", str(text)]:
            return Path(text)
        case ["list", list(parts)]:
            return [from_plain(part, other) for part in parts]
        case ["tuple", list(parts)]:
            return tuple(from_plain(part, other) for part in parts)
        case [str(kind), contents]:
            return other(kind, contents)
        case dict():
            return {key: from_plain(part, other) for key, part in plain.items()}
    raise ValueError(f"a message holds {plain!r}, which no rank sends")
