"""Counted nouns in messages."""

from __future__ import annotations


def number_of(number: int, thing: str, things: str | None = None) -> str:
    """Return "1 document", "2,000 documents"; `things` is the plural if it is not formed with an s."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"
