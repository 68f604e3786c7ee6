"""The family of embedder configs, chosen by `model.embedder.kind`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from stlm.config.yaml.fields import Component, setting


@dataclass(frozen=True)
class EmbedderConfig(Component):
    """Family of embedders. `patched`: one vector stands for several ids. `byte_ids`: ids are bytes."""

    patched: ClassVar[bool] = False
    byte_ids: ClassVar[bool] = False

    def positions_of(self, length: int) -> int:
        """Return the largest number of vectors that the core gets for `length` ids."""
        return length


def scaled_setting() -> Any:
    """Return the field `scaled`, which embedders share."""
    return setting(True, "multiply vectors by sqrt(width); false for models made without it, such as GPT-2")
