"""The limit on the input that is read: `--limit 1000` or 10k documents, or `--limit 10MB` of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_pipeline.errors import DataError

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
# 10k are documents; 10M or 1G without a B may be meant as either, and are refused.
_FORM = re.compile(r"(?P<number>\d+(?:\.\d+)?) ?(?:(?P<bytes>[kKMGT]?i?)[bB]|(?P<documents>[kK]?))")


@dataclass(frozen=True)
class Limit:
    """The number of documents, or of bytes of text, that may still be read; None: any number."""

    documents: int | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Parse a number of documents, "1000" or "10k", or of bytes, "10MB" or "1.5GiB". Raises DataError for anything
        else.
        """
        found = _FORM.fullmatch(text.strip())
        if found:
            is_documents = found["bytes"] is None
            unit = found["documents"] if is_documents else found["bytes"]
            number = float(found["number"]) * _UNITS.get(unit.upper(), 0)
            if number >= 1 and (not is_documents or number.is_integer()):
                return cls(documents=int(number)) if is_documents else cls(bytes=int(number))
        raise DataError(f"--limit {text!r}: expected a number of documents, 1000 or 10k, or of bytes, 10MB or 1.5GiB")

    def allows(self, documents: int, size: int) -> bool:
        """Return whether this many documents and bytes may be read."""
        return (self.documents is None or documents <= self.documents) and (self.bytes is None or size <= self.bytes)

    def without(self, documents: int, size: int) -> Limit:
        """Return the limit that remains after these have been read."""
        return Limit(
            None if self.documents is None else self.documents - documents,
            None if self.bytes is None else self.bytes - size,
        )
