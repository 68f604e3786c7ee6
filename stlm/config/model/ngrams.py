"""Hash n-gram embeddings: a section of the embedders that read ids one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, setting


@dataclass(frozen=True)
class NgramsConfig:
    """Vectors for the n ids up to and including each one, for every n from `shortest` to `longest`."""

    table_size: int = setting(0, "vectors for each n, shared by the n-grams whose hashes agree; 0: none", minimum=0)
    shortest: int = setting(2, "smallest n", minimum=2, needs=("table_size", 4096))
    longest: int = setting(2, "largest n", minimum=2, needs=("table_size", 4096))

    def check(self, model: ModelShape, key: str) -> Iterator[Conflict]:
        """Conflicts within and with the context; `key` is this section's."""
        if self.shortest > self.longest:
            yield Conflict(
                f"{key}.shortest",
                f"got {self.shortest}, expected at most model.{key}.longest = {self.longest}; "
                f"{self.longest} would work",
                (f"{key}.longest",),
            )
        elif self.table_size and self.longest > model.context_length:
            yield Conflict(
                f"{key}.longest",
                f"got {self.longest}, expected at most model.context_length = {model.context_length}; "
                f"{max(self.shortest, model.context_length)} would work",
                ("context_length",),
            )


@dataclass(frozen=True)
class ByteNgramsConfig(NgramsConfig):
    """The same over bytes, where longer ones are worth a vector."""

    shortest: int = setting(3, "smallest n", minimum=2, needs=("table_size", 4096))
    longest: int = setting(8, "largest n", minimum=2, needs=("table_size", 4096))
