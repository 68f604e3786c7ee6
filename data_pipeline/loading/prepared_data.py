"""Prepared data as training and evaluation read it: streams of ids, cut into windows.

A stream is all documents of a split in a row, each followed by end_of_text. A window is `context_length` ids of it
(`windows`), and every id is predicted once per epoch. Nothing is loaded: shards are mapped into memory when they are
touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.loading.order import Order
from data_pipeline.loading.windows import StreamWindows, Windows, WindowSet
from data_pipeline.storage.id_stream import IdStream
from data_pipeline.storage.manifest import SPLITS, TOKENIZER_DIR, Manifest, what_to_do
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

_BLOCK = 4096  # positions whose windows are computed together: one by one, the order would cost more than the reading
_VERIFIED_BYTES = 256 << 20  # half a second's work; more is hashed when it is asked for


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
