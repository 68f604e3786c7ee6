"""Interfaces of the models that decoding runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class DecodableModel(Protocol):
    """A model that reads ids step by step, for several rows at once."""

    def begin(self, batch_size: int, ids_BN: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return the logits [B, V] of the next id, and a new decoding state that has read the given ids."""
        ...

    def step(self, ids_BN: Tensor, state: Any) -> Tensor:
        """Read N more ids; return logits [B, N, V] of the id after each."""
        ...

    def join(self, parts: Sequence[tuple[Any, Tensor]]) -> Any:
        """Join the given rows of several states into one batch."""
        ...


class LayeredModel(DecodableModel, Protocol):
    """A model of known depth. Its states have a `snapshot`, so that rejected drafts can be undone."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers at the exits; the last is the whole core."""
        ...


class EarlyExitModel(LayeredModel, Protocol):
    """A model that can draw an id from an exit before its last layer."""

    def draft(self, ids_B1: Tensor, state: Any) -> Tensor:
        """Read one more id through the layers before the first exit; return that exit's logits [B, 1, V]."""
        ...

    def deepen(self, state: Any, stage: int) -> Tensor:
        """Run that id, and those that wait with it, to the next exit, `stage`; return that exit's logits [B, 1, V]."""
        ...


class DraftingModel(LayeredModel, Protocol):
    """A model that drafts with the layers before its first exit."""

    def draft(self, ids_B1: Tensor, state: Any) -> Tensor:
        """Read one more id through the first layers; return their logits [B, 1, V] of the id after it."""
        ...

    def verify(self, state: Any) -> Tensor:
        """Run all drafted ids through the remaining layers; return logits [B, N, V], equal to those of `step`."""
        ...

    def keep(self, state: Any, number: int) -> None:
        """Keep the first `number` of the ids just verified, and remove the others."""
        ...
