"""Work on items that several ranks share.

What scores items takes them in pieces, does its own, puts zeros in the place of the others, and adds all up. Pieces are
cut the same whatever the number of ranks, so every number is the one that a single rank would get. What knows nothing
of this is done by all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Share(NamedTuple):
    """Which pieces are done here: all of them, unless other ranks are at work too."""

    rank: int = 0
    world_size: int = 1
    add: Callable[[Sequence[float]], list[float]] = list  # each value summed over all ranks, which all call it

    def has(self, piece: int) -> bool:
        """Whether the piece of this number is done here."""
        return piece % self.world_size == self.rank


_ALL = Share()
_share = ContextVar("share", default=_ALL)  # so that tasks need not hand it on


def current_share() -> Share:
    """The share of this process in what is being scored."""
    return _share.get()


@contextmanager
def shared(share: Share) -> Iterator[None]:
    """Inside, what is scored is shared."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)
