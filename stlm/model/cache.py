"""Decoding state: what a layer must remember so that reading ids a few at a time equals reading them at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention layer, grown in place.

    With a `window`, only the last `window - 1` positions are kept between calls: no later query can see further back.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.length = 0  # positions ever appended: the position of the next query
        self._start = 0  # slice of the buffers that is in use
        self._end = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key_BNSK: Tensor, value_BNSK: Tensor) -> tuple[Tensor, Tensor, int]:
        """Add S positions. Returns all keys and values that the new queries may need, and the first one's position."""
        added = key_BNSK.size(2)
        if self.window is not None:
            self._start = max(self._start, self._end - (self.window - 1))
        self._reserve(added, key_BNSK, value_BNSK)
        assert self._keys is not None and self._values is not None
        self._keys[:, :, self._end : self._end + added] = key_BNSK
        self._values[:, :, self._end : self._end + added] = value_BNSK
        self._end += added
        self.length += added
        used = slice(self._start, self._end)
        return self._keys[:, :, used], self._values[:, :, used], self.length - (self._end - self._start)

    @property
    def nbytes(self) -> int:
        """Bytes that the next call may need, of those that were appended."""
        if self._keys is None or self._values is None:
            return 0
        used = slice(self._start if self.window is None else max(self._start, self._end - self.window + 1), self._end)
        return self._keys[:, :, used].nbytes + self._values[:, :, used].nbytes

    def _reserve(self, added: int, key_BNSK: Tensor, value_BNSK: Tensor) -> None:
        """Make room for `added` positions: move what is in use to the front of a buffer at least twice that size."""
        if self._keys is not None and self._end + added <= self._keys.size(2):
            return
        used = self._end - self._start
        self._keys = self._moved(self._keys, key_BNSK, used + added)
        self._values = self._moved(self._values, value_BNSK, used + added)
        self._start, self._end = 0, used

    def _moved(self, old: Tensor | None, like: Tensor, needed: int) -> Tensor:
        batch, heads, _, width = like.shape
        new = like.new_empty(batch, heads, max(64, 2 * needed), width)
        if old is not None:
            new[:, :, : self._end - self._start] = old[:, :, self._start : self._end]
        return new


class DecodingState:
    """Everything that `STLM.step` carries from call to call: each part's own cache, and the ids read so far."""

    def __init__(self, embedder: Any, core: Any, head: Any) -> None:
        self.embedder = embedder
        self.core = core
        self.head = head
        self.length = 0  # ids read, the start symbol not counted

    def caches(self) -> tuple[Any, Any, Any]:
        """Those of the embedder, the core and the head."""
        return self.embedder, self.core, self.head


def visible(
    num_queries: int, first_query: int, num_keys: int, first_key: int, window: int | None, device: torch.device
) -> Tensor:
    """Mask [queries, keys]: True where a query may see a key: not after it, and within `window` positions."""
    query = torch.arange(first_query, first_query + num_queries, device=device)[:, None]
    key = torch.arange(first_key, first_key + num_keys, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)
