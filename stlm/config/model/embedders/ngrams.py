"""Config of hash n-gram embeddings, a section of several embedders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, setting


@dataclass(frozen=True)
class NgramsConfig:
    """Hash embeddings of the n ids that end at each position, for every n from `shortest` to `longest`."""

    table_size: int = setting(
        0,
        "vectors in the table of each n; n-grams with equal hashes share one; 0: no n-grams",
        unit="vectors",
        minimum=0,
    )
    shortest: int = setting(2, "smallest n", unit="ids", minimum=2, needs=("table_size", 4096))
    longest: int = setting(2, "largest n", unit="ids", minimum=2, needs=("table_size", 4096))

    def check(self, model: ModelShape, key: str) -> Iterator[Conflict]:
        """Yield the conflicts between these settings and with the context. `key`: that of this section."""
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
    """Hash n-grams of bytes, with longer defaults."""

    shortest: int = setting(3, "smallest n", unit="bytes", minimum=2, needs=("table_size", 4096))
    longest: int = setting(8, "largest n", unit="bytes", minimum=2, needs=("table_size", 4096))
