"""Scoring of items sharded over ranks.

A task cuts its items into pieces, scores the pieces of its own rank, puts zeros in the place of the others, and sums
over ranks. The pieces do not depend on the number of ranks, so the results equal those of a single rank. Tasks that do
not take a shard are computed in full by every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class EvalShard(NamedTuple):
    """The pieces that this rank scores: all of them, unless there are other ranks."""

    rank: int = 0
    world_size: int = 1
    sum: Callable[[Sequence[float]], list[float]] = list  # sums each value over all ranks, which all call it

    def owns(self, piece: int) -> bool:
        """Return whether this rank scores the piece of this number."""
        return piece % self.world_size == self.rank


WHOLE = EvalShard()
