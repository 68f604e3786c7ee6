"""Errors in a user's data, paths or disk."""

from __future__ import annotations


class DataError(Exception):
    """A problem that the user can solve. The message says what, where, what was expected, and what to do."""

    exit_code = 2


class TooFew(DataError):
    """Error for an input of which too few documents are left."""
