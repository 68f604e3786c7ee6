"""Prepared data as training and evaluation read it: streams of ids, cut into windows.

A stream is all documents of a split in a row, each followed by end_of_text. A window is `context_length` ids of it, so
every id belongs to exactly one window and is predicted once per epoch. Nothing is loaded: shards are mapped into memory
when first touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.manifest import SPLITS, TOKENIZER_DIR, Manifest, ShardEntry
from data_pipeline.order import window_at
from data_pipeline.shards import Shard, map_ids
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

Windows = tuple[NDArray[np.int64], NDArray[np.bool_]]


class PreparedData:
    """A folder made by scripts/preprocess.py: its manifest, its tokenizer, and a stream of ids per split."""

    def __init__(self, dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        self.dir = dir
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.fingerprint = manifest.fingerprint

    @classmethod
    def open(cls, dir: str | os.PathLike[str], verify: bool = False) -> PreparedData:
        """Open a folder after checking the size of every file, and with `verify` the sha256 of every byte.

        Raises DataError if the folder is missing, unfinished or damaged, or its tokenizer is not the one the ids were
        made with.
        """
        dir = Path(dir)
        manifest = Manifest.load(dir)
        manifest.check(dir, hashes=verify)
        tokenizer = load_tokenizer(dir / TOKENIZER_DIR)
        if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
            raise DataError(
                f"the tokenizer in {dir / TOKENIZER_DIR} ({tokenizer.spec}) is not the one that its shards were "
                f"made with ({manifest.tokenizer['spec']}); delete {dir} and prepare the data again"
            )
        return cls(dir, manifest, tokenizer)

    def split(self, name: str) -> IdStream:
        """The stream of "train" or "validation"."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        return IdStream(self.dir, self.manifest.splits[name], self.tokenizer.dtype)


class IdStream:
    """The ids of one split, across its shards, as one long array that is read in pieces."""

    def __init__(self, dir: Path, shards: list[ShardEntry], dtype: np.dtype[Any]) -> None:
        self._prefixes = [dir / shard.path for shard in shards]
        self._stops = np.array(list(accumulate(shard.ids for shard in shards)), dtype=np.int64)
        self._maps: list[NDArray[Any] | None] = [None] * len(shards)
        self.dtype = dtype
        self.num_bytes = sum(shard.bytes for shard in shards)
        self.num_documents = sum(shard.documents for shard in shards)

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

    def documents(self) -> Iterator[NDArray[Any]]:
        """The ids of each document, end_of_text included, in the order of the stream."""
        for prefix in self._prefixes:
            yield from Shard(prefix)

    def _ids(self, shard: int) -> NDArray[Any]:
        ids = self._maps[shard]
        if ids is None:
            ids = self._maps[shard] = map_ids(self._prefixes[shard], self.dtype)
        return ids


class TrainLoader:
    """Batches for training. Row r of step s is the window at position s · batch_size + r of the endless order of
    `order.window_at`.

    Any rank or worker may ask for any rows of any step: there is no state, so there is nothing to save and nothing that
    could depend on how many processes share the work.
    """

    def __init__(self, stream: IdStream, context_length: int, batch_size: int, seed: int, pad_id: int) -> None:
        """batch_size: rows per step over all ranks. pad_id: fills the last window, if it is short."""
        self._windows = _WindowReader(stream, context_length, pad_id)
        self.batch_size = batch_size
        self.seed = seed
        self.num_windows = self._windows.num_windows

    def rows(self, step: int, first: int, last: int) -> Windows:
        """Rows [first, last) of a step: ids int64 [n, T], and loss_mask bool [n, T], false on padding."""
        if not 0 <= first <= last <= self.batch_size:
            raise IndexError(f"rows {first} to {last} of a batch of {self.batch_size}")
        positions = step * self.batch_size + np.arange(first, last, dtype=np.int64)
        return self._windows.read(window_at(positions, self.num_windows, self.seed))

    def epoch(self, step: int) -> float:
        """How many times the data has been seen before this step."""
        return step * self.batch_size / self.num_windows


class ValidationLoader:
    """All windows of a split, once, in the order of the text."""

    def __init__(self, stream: IdStream, context_length: int, pad_id: int) -> None:
        self._windows = _WindowReader(stream, context_length, pad_id)
        self.num_windows = self._windows.num_windows

    def windows(self, first: int, last: int) -> Windows:
        """Windows [first, last): ids int64 [n, T], and loss_mask bool [n, T], false on padding."""
        if not 0 <= first <= last <= self.num_windows:
            raise IndexError(f"windows {first} to {last} of {self.num_windows}")
        return self._windows.read(np.arange(first, last, dtype=np.int64))


class _WindowReader:
    """Cuts a stream into windows of T ids; the last one is padded."""

    def __init__(self, stream: IdStream, context_length: int, pad_id: int) -> None:
        if not len(stream):
            raise DataError("the split holds no ids: there is nothing to read")
        self._stream = stream
        self._context_length = context_length
        self._pad_id = pad_id
        self.num_windows = -(-len(stream) // context_length)

    def read(self, windows: NDArray[np.int64]) -> Windows:
        ids = np.full((len(windows), self._context_length), self._pad_id, dtype=np.int64)
        loss_mask = np.zeros(ids.shape, dtype=np.bool_)
        for row, window in enumerate(windows.tolist()):
            start = window * self._context_length
            piece = self._stream.read(start, min(start + self._context_length, len(self._stream)))
            ids[row, : len(piece)] = piece
            loss_mask[row, : len(piece)] = True
        return ids, loss_mask
