"""Decoding state: what a layer must remember so that reading ids a few at a time equals reading them at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROLL_BACK = 64  # positions that a windowed cache keeps beyond its window, so that it can be cut back by that many


class KeyValueCache:
    """Keys and values of one attention layer, grown in place.

    With a `window`, a query sees the last `window` positions only, and older ones are let go when room is needed.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.length = 0  # positions ever appended, those cut back not counted: the position of the next query
        self._held = 0  # the buffers hold the last so many of them, from their front on
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key_BNSK: Tensor, value_BNSK: Tensor) -> tuple[Tensor, Tensor, int]:
        """Add S positions. Returns all keys and values that the new queries may need, and the first one's position."""
        added = key_BNSK.size(2)
        self._reserve(added, key_BNSK, value_BNSK)
        assert self._keys is not None and self._values is not None
        first = 0 if self.window is None else max(0, self._held - (self.window - 1))
        end = self._held + added
        self._keys[:, :, self._held : end] = key_BNSK
        self._values[:, :, self._held : end] = value_BNSK
        self._held = end
        self.length += added
        return self._keys[:, :, first:end], self._values[:, :, first:end], self.length - (end - first)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. With a window, at most `ROLL_BACK` positions can be forgotten."""
        forgotten = self.length - length
        assert 0 <= forgotten <= (self._held if self.window is None else min(self._held, ROLL_BACK))
        self.length, self._held = length, self._held - forgotten

    @property
    def nbytes(self) -> int:
        """Bytes that the next call may need, of those that were appended."""
        if self._keys is None or self._values is None:
            return 0
        used = slice(0 if self.window is None else max(0, self._held - (self.window - 1)), self._held)
        return self._keys[:, :, used].nbytes + self._values[:, :, used].nbytes

    def _reserve(self, added: int, key_BNSK: Tensor, value_BNSK: Tensor) -> None:
        """Make room for `added` positions: move what is still needed to the front of new buffers, twice as long."""
        if self._keys is not None and self._held + added <= self._keys.size(2):
            return
        kept = self._held if self.window is None else min(self._held, self.window - 1 + ROLL_BACK)
        self._keys = self._moved(self._keys, key_BNSK, kept, kept + added)
        self._values = self._moved(self._values, value_BNSK, kept, kept + added)
        self._held = kept

    def _moved(self, old: Tensor | None, like: Tensor, kept: int, needed: int) -> Tensor:
        batch, heads, _, width = like.shape
        new = like.new_empty(batch, heads, max(64, 2 * needed), width)
        if old is not None:
            new[:, :, :kept] = old[:, :, self._held - kept : self._held]
        return new


class DecodingState:
    """Everything that `STLM.step` carries from call to call: each part's own cache, and the ids read so far.

    Where the rows of a batch are `ragged`, each advances the core in its own time, and has a cache of its own for it.
    """

    def __init__(self, embedder: Any, core: Any, head: Any, batch_size: int, ragged: bool) -> None:
        self.embedder = embedder
        self.core = core  # of all rows; of several that are ragged, a list: one of each
        self.head = head
        self.batch_size = batch_size
        self.ragged = ragged
        self.length = 0  # ids read, the start symbol not counted
        self.waiting: Any = None  # what was read through the first layers only: see `exits`

    def caches(self) -> tuple[Any, Any, Any]:
        """Those of the embedder, the core and the head."""
        return self.embedder, self.core, self.head

    def select(self, rows: Tensor) -> DecodingState:
        """The state of the given rows [B'] of the batch, in that order and as often as they are named; a state of its
        own. Beams that survive are picked so, and one prompt becomes many."""
        assert self.waiting is None

        def pick(cache: Any) -> Any:
            return mapped(cache, lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

        if self.ragged:
            each = self.core if self.batch_size > 1 else [self.core]
            core = [mapped(each[row], Tensor.clone) for row in rows.tolist()]
            core = core if len(core) > 1 else core[0]
        else:
            core = pick(self.core)
        new = DecodingState(pick(self.embedder), core, pick(self.head), rows.numel(), self.ragged)
        new.length = self.length
        return new


def mapped(cache: Any, function: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """A copy of any part's cache with `function` of each tensor in it, all of which begin with the batch: [B, …].

    Caches are made of plain attributes, lists, tuples and numbers. They replace their tensors rather than change
    them, but for keys and values, which grow behind what is in use. So a copy that shares the tensors stays what it was
    while the original reads on, and one can go back to it.
    """
    if isinstance(cache, Tensor):
        return function(cache)
    if isinstance(cache, list | tuple):
        items = [mapped(item, function) for item in cache]
        return type(cache)(*items) if hasattr(cache, "_fields") else type(cache)(items)
    if cache is None or isinstance(cache, int | float):
        return cache
    assert hasattr(cache, "__dict__"), f"what a cache remembers is no {type(cache).__name__}"
    new = copy.copy(cache)
    new.__dict__.update({name: mapped(value, function) for name, value in cache.__dict__.items()})
    return new


def visible(
    num_queries: int, first_query: int, num_keys: int, first_key: int, window: int | None, device: torch.device
) -> Tensor:
    """Mask [queries, keys]: True where a query may see a key: not after it, and within `window` positions."""
    query = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
    key = torch.arange(first_key, first_key + num_keys, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
