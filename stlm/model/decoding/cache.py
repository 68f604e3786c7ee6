"""Decoding state, with which reading ids a few at a time equals reading them at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROLL_BACK = 64  # positions that a windowed cache keeps beyond its window, so that they can be removed again


class KeyValueCache:
    """Keys and values of one attention layer, grown in place.

    With a `window`, a query sees the last `window` positions only, and older ones are dropped when room is needed.

    Rows are aligned at their newest position. Rows that have read fewer ids than others begin later: `begins_B` is the
    position at which each begins, and earlier positions are masked.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.length = 0  # positions appended, truncated ones not counted: the position of the next query
        self.begins_B: Tensor | None = None  # None: all begin at 0
        self._held = 0  # number of last positions in the buffers, from index 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key_BNSK: Tensor, value_BNSK: Tensor) -> tuple[Tensor, Tensor, int]:
        """Append S positions. Returns all keys and values that the new queries may need, and the first's position."""
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

    def visible(self, num_queries: int, num_keys: int, first_key: int) -> Tensor:
        """Mask of the newest queries over the keys that `append` returned: [T, S], or [B, 1, T, S] of unequal rows."""
        assert self._keys is not None
        device = self._keys.device
        mask = visible(num_queries, self.length - num_queries, num_keys, first_key, self.window, device)
        if self.begins_B is None:
            return mask
        key_S = torch.arange(first_key, first_key + num_keys, device=device)
        return mask & (key_S >= self.begins_B[:, None, None, None])

    @classmethod
    def joined(cls, caches: Sequence[KeyValueCache], rows: Sequence[Tensor]) -> KeyValueCache:
        """Join the given rows of each cache into a new one, as long as the longest of them."""
        new, begins = cls(caches[0].window), []
        for cache, rows_R in zip(caches, rows, strict=True):
            begins_B = cache.begins_B if cache.begins_B is not None else torch.zeros(int(rows_R.max()) + 1).long()
            begins.append(begins_B.index_select(0, rows_R.to(begins_B.device)) - cache.length)
        new.length = -min(int(begins_R.min()) for begins_R in begins)
        if not new.length:  # nothing has been read
            return new
        own_R = torch.cat(begins) + new.length
        filled = [cache for cache in caches if cache._keys is not None]
        new._held = min(new.length, max(cache._held for cache in filled))
        if new.window is not None:
            new._held = min(new._held, new.window - 1 + ROLL_BACK)
        new._keys = cls._gathered([cache._keys for cache in caches], caches, rows, new._held)
        new._values = cls._gathered([cache._values for cache in caches], caches, rows, new._held)
        new.begins_B = own_R.to(new._keys.device) if bool(own_R.any()) else None
        return new

    @staticmethod
    def _gathered(
        buffers: Sequence[Tensor | None], caches: Sequence[KeyValueCache], rows: Sequence[Tensor], held: int
    ) -> Tensor:
        """Copy rows of several buffers into a new one, aligned to end at `held`; zeros before a row's beginning."""
        like = next(buffer for buffer in buffers if buffer is not None)
        heads, width = like.size(1), like.size(3)
        new = like.new_empty(sum(rows_R.numel() for rows_R in rows), heads, max(64, 2 * held), width)
        first_row = 0
        for buffer, cache, rows_R in zip(buffers, caches, rows, strict=True):
            mine, kept = slice(first_row, first_row + rows_R.numel()), min(held, cache._held)
            new[mine, :, : held - kept] = 0
            if buffer is not None and kept:
                last = buffer[:, :, cache._held - kept : cache._held]
                new[mine, :, held - kept : held] = last.index_select(0, rows_R.to(last.device))
            first_row = mine.stop
        return new

    def truncate(self, length: int) -> None:
        """Remove all positions from `length` on. With a window, at most `ROLL_BACK` positions can be removed."""
        forgotten = self.length - length
        assert 0 <= forgotten <= (self._held if self.window is None else min(self._held, ROLL_BACK))
        self.length, self._held = length, self._held - forgotten

    @property
    def nbytes(self) -> int:
        """Bytes of the appended keys and values that the next call may need."""
        if self._keys is None or self._values is None:
            return 0
        used = slice(0 if self.window is None else max(0, self._held - (self.window - 1)), self._held)
        return self._keys[:, :, used].nbytes + self._values[:, :, used].nbytes

    def _reserve(self, added: int, key_BNSK: Tensor, value_BNSK: Tensor) -> None:
        """Make room for `added` positions: copy what is still needed to new buffers of twice the length."""
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
    """State that `STLM.step` carries from call to call: the caches of all parts, and the number of ids read.

    Rows may join and leave a batch at any time, and may have read different numbers of ids. If they add positions to
    the core at different times, each has its own core cache: `core` is then a list of one cache a row, and `apart` is
    True. This is so for `patches` that are `ragged`, which begin where a text's contents decide, and for patches of
    rows that have read different numbers of ids.
    """

    def __init__(
        self, embedder: Any, core: Any, head: Any, lengths: list[int], *, patches: bool, ragged: bool, apart: bool
    ) -> None:
        self.embedder = embedder
        self.core = core
        self.head = head
        self.lengths = lengths  # ids that each row has read, the start symbol not counted
        self.patches = patches
        self.ragged = ragged
        self.apart = apart
        self.waiting: Any = None  # ids read through the first layers only: see `exits`

    def caches(self) -> tuple[Any, Any, Any]:
        """Return the caches of the embedder, the core and the head."""
        return self.embedder, self.core, self.head

    def read(self, number: int) -> None:
        """Add to the number of ids that all rows have read; negative for ids that were removed."""
        self.lengths = [length + number for length in self.lengths]

    def select(self, rows: Tensor) -> DecodingState:
        """Return an independent state of the given rows [B'] of the batch, in that order; a row may be repeated. Used
        to keep surviving beams, and to continue one prompt many times."""
        return joined([(self, rows)])

    def snapshot(self) -> DecodingState:
        """Return a copy of the state to which decoding can go back after this one has read more."""
        assert self.waiting is None
        new = copy.copy(self)
        new.embedder, new.core, new.head = (snapshot(cache) for cache in self.caches())
        return new


def joined(parts: Sequence[tuple[DecodingState, Tensor]]) -> DecodingState:
    """Join rows of several states of one model into one batch."""
    states, rows = [state for state, _ in parts], [rows_R for _, rows_R in parts]
    assert not any(state.waiting for state in states)
    lengths = [state.lengths[row] for state, rows_R in parts for row in rows_R.tolist()]
    patches, ragged = states[0].patches, states[0].ragged
    apart = len(lengths) > 1 and patches and (ragged or len(set(lengths)) > 1)
    core: Any
    if apart or any(state.apart for state in states):
        each = [_core_of(state, row) for state, rows_R in parts for row in rows_R.tolist()]
        core = each if apart else gathered(each, [torch.zeros(1, dtype=torch.long)] * len(each))
    else:
        core = gathered([state.core for state in states], rows)
    embedder = gathered([state.embedder for state in states], rows)
    head = gathered([state.head for state in states], rows)
    return DecodingState(embedder, core, head, lengths, patches=patches, ragged=ragged, apart=apart)


def _core_of(state: DecodingState, row: int) -> Any:
    """Copy the core's cache of one row."""
    if state.apart:
        return gathered([state.core[row]], [torch.zeros(1, dtype=torch.long)])
    return gathered([state.core], [torch.tensor([row])])


def gathered(caches: Sequence[Any], rows: Sequence[Tensor]) -> Any:
    """Concatenate the given rows of several caches of one part into a new cache that shares nothing with them.

    Caches consist of plain attributes, lists, tuples and numbers; the first dimension of all tensors is the batch.
    """
    first = caches[0]
    if isinstance(first, KeyValueCache):
        return KeyValueCache.joined(caches, rows)
    if isinstance(first, Tensor):
        return torch.cat(
            [cache.index_select(0, rows_R.to(cache.device)) for cache, rows_R in zip(caches, rows, strict=True)]
        )
    if isinstance(first, list | tuple):
        items = [gathered(column, rows) for column in zip(*caches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if first is None or isinstance(first, int | float):
        assert all(cache == first for cache in caches)
        return first
    assert hasattr(first, "__dict__"), f"a cache holds a {type(first).__name__}, which cannot be joined"
    new = copy.copy(first)
    columns = {name: [cache.__dict__[name] for cache in caches] for name in first.__dict__}
    new.__dict__.update({name: gathered(column, rows) for name, column in columns.items()})
    return new


def snapshot(cache: Any) -> Any:
    """Return a copy of any part's cache that shares its tensors.

    Caches replace their tensors instead of changing them, except keys and values, which grow after the part in use. So
    the copy stays valid while the original reads more ids.
    """
    if isinstance(cache, list | tuple):
        items = [snapshot(item) for item in cache]
        return type(cache)(*items) if hasattr(cache, "_fields") else type(cache)(items)
    if isinstance(cache, Tensor) or not hasattr(cache, "__dict__"):
        return cache
    new = copy.copy(cache)
    new.__dict__.update({name: snapshot(value) for name, value in cache.__dict__.items()})
    return new


def visible(
    num_queries: int, first_query: int, num_keys: int, first_key: int, window: int | None, device: torch.device
) -> Tensor:
    """Mask [queries, keys], True where a query sees a key: one that is not later, and within `window` positions."""
    query = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
    key = torch.arange(first_key, first_key + num_keys, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
