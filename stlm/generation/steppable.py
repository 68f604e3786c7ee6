"""Interface of the models that decoding runs: begin, step and join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Steppable(Protocol):
    """Interface of a model that the decoding loop can run."""

    def begin(self, batch_size: int, ids_BN: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the logits [B, V] of the next id, and a new decoding state that has read the given ids."""
        ...

    def step(self, ids_BN: Tensor, state: Any) -> Tensor:
        """Read N more ids; return logits [B, N, V] of the id after each."""
        ...

    def join(self, parts: Sequence[tuple[Any, Tensor]]) -> Any:
        """Join the given rows of several states into one batch."""
        ...
