"""What the parts of a model know of the ids that they read and predict."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """The text of each id, in bytes: a fact of the tokenizer, so no part of the config and never saved with a model."""

    spellings: tuple[bytes, ...]  # of id 0, 1, …; special ids stand for no text and have b""

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self.spellings)
