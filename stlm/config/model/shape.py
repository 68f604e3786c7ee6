"""Protocol of the part of a model's config that the checks of its components may read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from stlm.config.yaml.fields import Conflict


class ModelShape(Protocol):
    """View of a ModelConfig for its components."""

    @property
    def context_length(self) -> int:
        """Ids of a training window."""
        ...

    @property
    def width(self) -> int:
        """Width of the core."""
        ...

    @property
    def embedder(self) -> Any:
        """Config of the embedder."""
        ...

    @property
    def core(self) -> Any:
        """Config of the core."""
        ...

    @property
    def head(self) -> Any:
        """Config of the head."""
        ...

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between the parts."""
        ...
