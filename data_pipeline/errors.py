"""Errors in a user's data, paths or disk."""

from __future__ import annotations


class DataError(Exception):
    """A problem that the user can solve. The message says what, where, what was expected, and what to do."""

    exit_code = 2


class TooFew(DataError):
    """Error for an input of which too few documents are left."""


def first_line(error: Exception) -> str:
    """Return the first line of an error of another library, or its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
