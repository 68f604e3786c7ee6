"""The spelling of ids, as known to the parts of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """The text of each id, in bytes. It follows from the tokenizer, so neither config nor checkpoint holds it."""

    spellings: tuple[bytes, ...]  # of id 0, 1, …; special ids stand for no text and have b""

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self.spellings)
