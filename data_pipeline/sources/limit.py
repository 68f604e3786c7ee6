"""The limit on the input that is read: `--limit 1000` documents, or `--limit 10MB` of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data_pipeline.errors import DataError

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_FORM = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kKMGT]?i?)[bB])?")


@dataclass(frozen=True)
class Limit:
    """The number of documents, or of bytes of text, that may still be read; None: any number."""

    documents: int | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Parse a number of documents, or with a unit of bytes: "1000", "10MB", "1.5GiB". Raises DataError for anything
        else.
        """
        match = _FORM.fullmatch(text.strip())
        unit = None if match is None or match[2] is None else match[2].upper()
        number = 0.0 if match is None else float(match[1]) * _UNITS.get(unit or "", 0)
        if number < 1 or (unit is None and not number.is_integer()):
            raise DataError(f"--limit {text!r}: expected a number of documents, 1000, or of bytes, 10MB or 1.5GiB")
        return cls(documents=int(number)) if unit is None else cls(bytes=int(number))

    def allows(self, documents: int, size: int) -> bool:
        """Return whether this many documents and bytes may be read."""
        return (self.documents is None or documents <= self.documents) and (self.bytes is None or size <= self.bytes)

    def without(self, documents: int, size: int) -> Limit:
        """Return the limit that remains after these have been read."""
        return Limit(
            None if self.documents is None else self.documents - documents,
            None if self.bytes is None else self.bytes - size,
        )
