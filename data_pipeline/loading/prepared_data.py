"""Prepared data as training and evaluation read it: streams of ids, cut into windows.

A stream is all documents of a split in a row, each followed by end_of_text. A window is `context_length` ids of it
(`windows`), and every id is predicted once per epoch. Nothing is loaded: shards are mapped into memory when they are
touched.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.loading.order import Order
from data_pipeline.loading.windows import StreamWindows, Windows, WindowSet
from data_pipeline.storage.manifest import SPLITS, TOKENIZER_DIR, Manifest, ShardEntry, what_to_do
from data_pipeline.storage.shards import Shard, given_path, map_ids
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

_BLOCK = 4096  # positions whose windows are computed together: one by one, the order would cost more than the reading
_VERIFIED_BYTES = 256 << 20  # half a second's work; more is hashed when it is asked for
_MAPS = 256  # shards mapped at a time: each holds a file open, and a process may have only so many


class SourceRange(NamedTuple):
    """Where in a split's stream the documents of one source stand: ids [start, stop)."""

    name: str
    start: int
    stop: int


class PreparedData:
    """A folder made by scripts/preprocess.py: its manifest, its tokenizer, and a stream of ids per split."""

    def __init__(self, dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.dir = dir
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.fingerprint = manifest.fingerprint

    @classmethod
    def open(cls, dir: str | os.PathLike[str], verify: bool | None = False) -> PreparedData:
        """Open a folder after checking the size of every file, and with `verify` the sha256 of every byte.

        `verify` None: if the folder is so small that this takes a moment only.

        Raises DataError if the folder is missing, unfinished or damaged, or its tokenizer is not the one the ids were
        made with.
        """
        dir = Path(dir)
        manifest = Manifest.load(dir)
        if verify is None:
            verify = is_small(sum(file.size for file in manifest.files(dir)))
        manifest.check(dir, hashes=verify)
        return cls(dir, manifest, check_tokenizer(dir, manifest))

    def split(self, name: str) -> IdStream:
        """The stream of "train", "validation" or "test". DataError if there is no text for a test."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        shards = self.manifest.splits.get(name, [])
        if not shards and name == "test":
            raise DataError(
                f"{self.dir} holds no text for a test; prepare the data with scripts/preprocess.py --test PATH"
            )
        return IdStream([self.dir / shard.path for shard in shards], shards, [self.tokenizer.dtype] * len(shards))

    def sources(self, split: str) -> list[SourceRange]:
        """Which ids of a split's stream come from which source, in the order of the stream; empty ones left out."""
        ranges, start = [], 0
        for source in self.manifest.sources:
            if (ids := source.get(split, {}).get("ids", 0)) > 0:
                ranges.append(SourceRange(source["name"], start, start + ids))
                start += ids
        if ranges:
            return ranges
        names = [source["name"] for source in self.manifest.sources]
        return [SourceRange(" + ".join(names) or str(self.dir), 0, self.manifest.total(split, "ids"))]


def check_tokenizer(dir: str | os.PathLike[str], manifest: Manifest) -> Tokenizer:
    """The tokenizer of prepared data. DataError if it is not the one that the ids were made with."""
    folder = Path(dir) / TOKENIZER_DIR
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
        raise DataError(
            f"the tokenizer in {folder} ({tokenizer.spec}) is not the one that its shards were made with "
            f"({manifest.tokenizer['spec']}); {what_to_do(dir)}"
        )
    return tokenizer


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
        """For each id 1 where it is only read, and 0 where it counts in the loss; None where all of them count."""
        return _Given(self._prefixes, self._shards) if any(shard.given_sha256 for shard in self._shards) else None

    @classmethod
    def joined(cls, streams: Sequence[IdStream]) -> IdStream:
        """Streams in a row."""
        prefixes = [prefix for stream in streams for prefix in stream._prefixes]
        dtypes = [dtype for stream in streams for dtype in stream._dtypes]
        return cls(prefixes, [shard for stream in streams for shard in stream._shards], dtypes)

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """A copy of ids [start, stop), of the dtype they have on disk. IndexError beyond the ends."""
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
        """Rows of `length` ids from each of `starts` [n] on: [n, length], with `fill` behind the end of the stream."""
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
                # Every row of the shard that there could be, overlapping: no copy before the rows are picked.
                possible = as_strided(ids, (len(ids) - length + 1, length), (ids.itemsize, ids.itemsize))
                out[rows[whole]] = possible[offsets[whole]]
            for row in rows[~whole].tolist():  # goes on in the next shard, or ends with the stream
                start = int(starts[row])
                piece = self.read(start, min(start + length, len(self)))
                out[row, : len(piece)] = piece
                out[row, len(piece) :] = fill
        return out

    def document_sizes(self) -> Iterator[NDArray[np.int32]]:
        """Ids of each document, end_of_text included, in the order of the stream, one array per shard."""
        for prefix in self._prefixes:
            shard = Shard(prefix)
            if len(shard.sizes) == len(shard):  # as it is written here
                yield shard.sizes
            else:  # other programs write documents of several sequences
                stops = np.concatenate([[0], np.cumsum(shard.sizes, dtype=np.int64)])[shard.documents]
                yield np.diff(stops).astype(np.int32)

    def documents(self) -> Iterator[NDArray[Any]]:
        """The ids of each document, end_of_text included, in the order of the stream."""
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


class _Given(IdStream):
    """What stands beside the ids of conversations."""

    def __init__(self, prefixes: Sequence[Path], shards: Sequence[ShardEntry]) -> None:
        super().__init__(prefixes, shards, [np.dtype(np.uint8)] * len(shards))

    def _map(self, shard: int) -> NDArray[Any]:
        if self._shards[shard].given_sha256 is None:
            return np.zeros(self._shards[shard].ids, np.uint8)  # never touched, so never in memory
        return np.memmap(given_path(self._prefixes[shard]), dtype=np.uint8, mode="r")


def is_small(num_bytes: int) -> bool:
    """Whether so many bytes are hashed before a run without being asked for."""
    return num_bytes <= _VERIFIED_BYTES


class TrainLoader:
    """Batches for training: row r of step s is the window that stands at position s · batch_size + r of the order.

    Any rank or worker may ask for any rows of any step: there is no state, so there is nothing to save and nothing that
    could depend on how many processes share the work.
    """

    def __init__(self, windows: WindowSet, order: Order, batch_size: int) -> None:
        """batch_size: rows per step over all ranks."""
        self._windows = windows
        self._order = order
        self._block: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # the last one computed
        self.batch_size = batch_size
        self.num_windows = windows.num_windows

    def rows(self, step: int, first: int, last: int) -> Windows:
        """Rows [first, last) of a step."""
        if not 0 <= first <= last <= self.batch_size:
            raise IndexError(f"rows {first} to {last} of a batch of {self.batch_size}")
        return self._windows.read(self._windows_at(step * self.batch_size + first, step * self.batch_size + last))

    def span(self, first: int, last: int) -> Windows:
        """The windows at positions [first, last) of the order, whatever steps they belong to."""
        return self._windows.read(self._windows_at(first, last))

    def epoch(self, step: int) -> float:
        """Windows visited before `step`, in units of all windows; of a mixture, those of all its parts."""
        return step * self.batch_size / self.num_windows

    def _windows_at(self, first: int, last: int) -> NDArray[np.int64]:
        found = [np.empty(0, np.int64)]
        for number in range(first // _BLOCK, -(-last // _BLOCK)):
            start = number * _BLOCK
            if self._block[0] != number:
                self._block = number, self._order(np.arange(start, start + _BLOCK, dtype=np.int64))
            found.append(self._block[1][max(first - start, 0) : last - start])
        return np.concatenate(found)


class ValidationLoader:
    """All windows of a stream once, in their natural order."""

    def __init__(
        self,
        stream: IdStream,
        context_length: int,
        pad_id: int,
        end_of_text_id: int | None = None,
        sources: Sequence[SourceRange] = (),
    ) -> None:
        """end_of_text_id: number the documents of a window, see `StreamWindows`. sources: what the stream is made of,
        all of it; none: one source without a name."""
        self._windows = StreamWindows(stream, context_length, pad_id, end_of_text_id)
        self._context_length = context_length
        self._stops = np.array([source.stop for source in sources][:-1], dtype=np.int64)
        self.source_names = [source.name for source in sources] or [""]
        self.num_windows = self._windows.num_windows

    def windows(self, first: int, last: int) -> Windows:
        """Windows [first, last)."""
        if not 0 <= first <= last <= self.num_windows:
            raise IndexError(f"windows {first} to {last} of {self.num_windows}")
        return self._windows.read(np.arange(first, last, dtype=np.int64))

    def source_ids(self, first: int, last: int) -> NDArray[np.int64]:
        """Which source each id of windows [first, last) comes from: [n, T], indices of `source_names`."""
        places = np.arange(first * self._context_length, last * self._context_length)
        return np.searchsorted(self._stops, places, side="right").reshape(-1, self._context_length)
