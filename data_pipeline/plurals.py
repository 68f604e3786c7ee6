"""Numbers of things in messages."""

from __future__ import annotations


def number_of(number: int, thing: str, things: str | None = None) -> str:
    """ "1 document", "2,000 documents"; `things` is the plural where it is not made by an s."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"
