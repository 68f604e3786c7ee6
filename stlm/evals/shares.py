"""Scoring of items split over ranks.

A task cuts its items into pieces, scores the pieces of its own rank, puts zeros in the place of the others, and sums
over ranks. The pieces do not depend on the number of ranks, so the results equal those of a single rank. Tasks that do
not use this module are computed in full by every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Share(NamedTuple):
    """The pieces that this rank scores: all of them, unless there are other ranks."""

    rank: int = 0
    world_size: int = 1
    add: Callable[[Sequence[float]], list[float]] = list  # each value summed over all ranks, which all call it

    def has(self, piece: int) -> bool:
        """Return whether this rank scores the piece of this number."""
        return piece % self.world_size == self.rank


_ALL = Share()
_share = ContextVar("share", default=_ALL)  # tasks need not pass it on


def current_share() -> Share:
    """Return the share of this process."""
    return _share.get()


@contextmanager
def shared(share: Share) -> Iterator[None]:
    """Set the share of this process inside the `with` block."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)
