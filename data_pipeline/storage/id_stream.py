"""All ids of a split as one stream: its shards in sequence, memory-mapped on first access."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from data_pipeline.storage.manifest import ShardEntry
from data_pipeline.storage.shards import Shard, given_path, map_ids

_MAPS = 256  # shards mapped at a time: each keeps a file open, and open files are limited


class IdStream:
    """The ids of one split, across its shards, as one long array that is read in pieces."""

    def __init__(self, prefixes: Sequence[Path], shards: Sequence[ShardEntry], dtypes: Sequence[np.dtype[Any]]) -> None:
        self._prefixes = list(prefixes)
        self._shards = list(shards)
        self._dtypes = list(dtypes)
        self._stops = np.array(list(accumulate(shard.ids for shard in shards)), dtype=np.int64)
        self._maps: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self.dtype = np.result_type(*set(dtypes)) if dtypes else np.dtype(np.uint8)
        self.num_bytes = sum(shard.bytes for shard in shards)
        self.num_documents = sum(shard.documents for shard in shards)

    @property
    def given(self) -> IdStream | None:
        """A stream with 1 for each id that is only read and 0 for each that counts in the loss; None if all count."""
        return GivenStream(self._prefixes, self._shards) if any(shard.given_sha256 for shard in self._shards) else None

    @classmethod
    def joined(cls, streams: Sequence[IdStream]) -> IdStream:
        """Concatenate streams."""
        prefixes = [prefix for stream in streams for prefix in stream._prefixes]
        dtypes = [dtype for stream in streams for dtype in stream._dtypes]
        return cls(prefixes, [shard for stream in streams for shard in stream._shards], dtypes)

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of ids [start, stop), in the dtype on disk. Raises IndexError beyond the ends."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"ids {start} to {stop} of a stream of {len(self)}")
        out = np.empty(stop - start, dtype=self.dtype)
        filled = 0
        shard = int(np.searchsorted(self._stops, start, side="right"))
        while filled < len(out):
            ids = self._ids(shard)
            offset = start + filled - (int(self._stops[shard]) - len(ids))
            piece = ids[offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return out

    def rows(self, starts: NDArray[np.int64], length: int, fill: int) -> NDArray[np.int64]:
        """Return rows of `length` ids from each of `starts` [n]: [n, length], `fill` after the end of the stream."""
        out = np.empty((len(starts), length), dtype=np.int64)
        if not len(starts):
            return out
        shards = np.searchsorted(self._stops, starts, side="right")
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        for rows in np.split(order, cuts):
            shard = int(shards[rows[0]])
            ids = self._ids(shard)
            offsets = starts[rows] - (int(self._stops[shard]) - len(ids))
            whole = offsets + length <= len(ids)
            if whole.any():
                # A view of all possible rows of the shard, overlapping: nothing is copied before rows are picked.
                possible = as_strided(ids, (len(ids) - length + 1, length), (ids.itemsize, ids.itemsize))
                out[rows[whole]] = possible[offsets[whole]]
            for row in rows[~whole].tolist():  # continues in the next shard, or ends with the stream
                start = int(starts[row])
                piece = self.read(start, min(start + length, len(self)))
                out[row, : len(piece)] = piece
                out[row, len(piece) :] = fill
        return out

    def document_sizes(self) -> Iterator[NDArray[np.int32]]:
        """Yield the number of ids of each document, end_of_text included, in stream order, one array per shard."""
        for prefix in self._prefixes:
            shard = Shard(prefix)
            if len(shard.sizes) == len(shard):  # as written by this package
                yield shard.sizes
            else:  # other programs write documents of several sequences each
                stops = np.concatenate([[0], np.cumsum(shard.sizes, dtype=np.int64)])[shard.documents]
                yield np.diff(stops).astype(np.int32)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Yield the ids of each document, end_of_text included, in stream order."""
        for prefix in self._prefixes:
            yield from Shard(prefix)

    def _ids(self, shard: int) -> NDArray[Any]:
        ids = self._maps.get(shard)
        if ids is not None:
            self._maps.move_to_end(shard)
            return ids
        if len(self._maps) >= _MAPS:
            self._maps.popitem(last=False)
        ids = self._maps[shard] = self._map(shard)
        return ids

    def _map(self, shard: int) -> NDArray[Any]:
        return np.asarray(map_ids(self._prefixes[shard], self._dtypes[shard]))


class GivenStream(IdStream):
    """The marks of a conversation's ids: 1 if an id is only read, 0 if it counts in the loss."""

    def __init__(self, prefixes: Sequence[Path], shards: Sequence[ShardEntry]) -> None:
        super().__init__(prefixes, shards, [np.dtype(np.uint8)] * len(shards))

    def _map(self, shard: int) -> NDArray[Any]:
        if self._shards[shard].given_sha256 is None:
            return np.zeros(self._shards[shard].ids, np.uint8)  # zero pages that are only read take no memory
        return np.memmap(given_path(self._prefixes[shard]), dtype=np.uint8, mode="r")
