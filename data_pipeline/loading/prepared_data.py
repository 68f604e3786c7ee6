"""Prepared data as training and evaluation read it: streams of ids, cut into windows.

A stream is all documents of a split in sequence, each followed by end_of_text. A window is `context_length` ids of it
(`windows`), and every id is predicted once per epoch. Shards are memory-mapped on first access, not loaded.
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
from data_pipeline.storage.manifest import SPLITS, TOKENIZER_DIR, Manifest, how_to_repair
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

_BLOCK = 4096  # positions whose windows are computed together; one by one, this would cost more than reading
_VERIFIED_BYTES = 256 << 20  # hashed in half a second; larger data only on request


class SourceRange(NamedTuple):
    """The part of a split's stream that holds the documents of one source: ids [start, stop)."""

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

        `verify` None: only if the folder is small enough for this to take a moment.

        Raises DataError if the folder is missing, unfinished or damaged, or if its tokenizer is not the one that made
        the ids.
        """
        dir = Path(dir)
        manifest = Manifest.load(dir)
        if verify is None:
            verify = is_small(sum(file.size for file in manifest.files(dir)))
        manifest.check(dir, hashes=verify)
        return cls(dir, manifest, check_tokenizer(dir, manifest))

    def split(self, name: str) -> IdStream:
        """Return the stream of "train", "validation" or "test". Raises DataError if there is no text for a test."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        shards = self.manifest.splits.get(name, [])
        if not shards and name == "test":
            raise DataError(
                f"{self.dir} holds no text for a test; prepare the data with scripts/preprocess.py --test PATH"
            )
        return IdStream([self.dir / shard.path for shard in shards], shards, [self.tokenizer.dtype] * len(shards))

    def sources(self, split: str) -> list[SourceRange]:
        """Return the range of ids of each source in a split's stream, in order; empty sources are left out."""
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
    """Return the tokenizer of prepared data. Raises DataError if it is not the one that made the ids."""
    folder = Path(dir) / TOKENIZER_DIR
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
        raise DataError(
            f"the tokenizer in {folder} ({tokenizer.spec}) is not the one that its shards were made with "
            f"({manifest.tokenizer['spec']}); {how_to_repair(dir)}"
        )
    return tokenizer


def is_small(num_bytes: int) -> bool:
    """Return whether this many bytes are hashed before a run by default."""
    return num_bytes <= _VERIFIED_BYTES


class TrainLoader:
    """Rows of the training steps, numbered from 1. Each step reads the windows after those of the step before.

    Any rank or worker may request any rows of any step. No iterator has to be saved, and nothing depends on the number
    of processes that share the work. `batch_sizes` lists pairs of a step and the rows of each step after it:
    [[0, 32], [500, 64]] is 32 up to step 500 and 64 after it.
    """

    def __init__(
        self, windows: WindowSet, order: Order, batch_size: int, fingerprint: str = "", description: str = ""
    ) -> None:  # fmt: skip
        """`batch_size`: rows per step over all ranks. `fingerprint`, `description`: of the data."""
        self._windows = windows
        self._order = order
        self._block: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # the last one computed
        self.num_windows = windows.num_windows
        self.batch_sizes = [[0, batch_size]]
        self.fingerprint = fingerprint
        self.description = description

    def rows(self, step: int, first: int, last: int) -> Windows:
        """Return rows [first, last) of a step: a pure function of data, seed, batch sizes, step and row."""
        if not 0 <= first <= last <= self.batch_size(step):
            raise IndexError(f"rows {first} to {last} of a batch of {self.batch_size(step)}")
        start = self.sequences(step - 1)
        return self._windows.read(self._windows_at(start + first, start + last))

    def batch_size(self, step: int) -> int:
        """Return the number of rows of a step."""
        return next(size for first, size in reversed(self.batch_sizes) if first < step or first == 0)

    def sequences(self, step: int) -> int:
        """Return the number of rows in the first `step` steps together."""
        ends = [first for first, _ in self.batch_sizes[1:]] + [step]
        return sum(
            size * max(0, min(end, step) - first) for (first, size), end in zip(self.batch_sizes, ends, strict=True)
        )

    def epoch(self, step: int) -> float:
        """Return the windows visited up to the end of `step` as a multiple of all windows, of all parts for a
        mixture."""
        return self.sequences(step) / self.num_windows

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
        """end_of_text_id: if given, number the documents of a window: see `StreamWindows`. sources: the sources of the
        stream, which together cover it; none: one source without a name.
        """
        self._windows = StreamWindows(stream, context_length, pad_id, end_of_text_id)
        self._context_length = context_length
        self._stops = np.array([source.stop for source in sources][:-1], dtype=np.int64)
        self.source_names = [source.name for source in sources] or [""]
        self.num_windows = self._windows.num_windows

    def windows(self, first: int, last: int) -> Windows:
        """Return windows [first, last)."""
        if not 0 <= first <= last <= self.num_windows:
            raise IndexError(f"windows {first} to {last} of {self.num_windows}")
        return self._windows.read(np.arange(first, last, dtype=np.int64))

    def source_ids(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the source of each id of windows [first, last): [n, T], indices of `source_names`."""
        places = np.arange(first * self._context_length, last * self._context_length)
        return np.searchsorted(self._stops, places, side="right").reshape(-1, self._context_length)
