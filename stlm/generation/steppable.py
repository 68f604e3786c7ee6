"""The part of a model that decoding needs: begin, step and join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Steppable(Protocol):
    """What the loop needs of a model."""

    def begin(self, batch_size: int, ids_BN: Tensor | None = None) -> tuple[Tensor, Any]:
        """A new decoding state that has read the ids given, and the logits [B, V] of what follows."""
        ...

    def step(self, ids_BN: Tensor, state: Any) -> Tensor:
        """Read N more ids; logits [B, N, V] of the id that follows each of them."""
        ...

    def join(self, parts: Sequence[tuple[Any, Tensor]]) -> Any:
        """The given rows of each of several states as one batch."""
        ...
