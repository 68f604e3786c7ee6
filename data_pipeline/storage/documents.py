"""The documents of a preparation in its work folder: the text, length and hash of each, and the split chosen for it.

Each unit of the sources has three files: `.text`, its documents as UTF-8, each followed by one byte 0xFF; `.index.npy`,
the length and hash of each; `.json`, written last, the counts. `.choice.npy` follows: the split of each document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.storage.atomic import save_array, writing
from data_pipeline.storage.cleaning_record import Record

DROPPED, TRAIN, VALIDATION, TEST = 0, 1, 2, 3
CHOICES = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
REMOVED = "removed.jsonl"  # file of a unit that lists the documents left out by cleaning

INDEX = np.dtype([("length", "<i8"), ("high", "<u8"), ("low", "<u8")])
_BLOCK = 16 << 20  # bytes of documents yielded at a time


@dataclass(frozen=True)
class Gathered:
    """The gathered documents of one unit."""

    prefix: Path
    source: int = 0  # the number of its source

    @property
    def index(self) -> NDArray[Any]:
        """Per document: `length` in bytes, 0xFF included, and the two halves of its hash, `high` and `low`."""
        return np.load(self.file("index.npy"), mmap_mode="r")

    @property
    def choice(self) -> NDArray[np.uint8]:
        """Per document: DROPPED, TRAIN, VALIDATION or TEST."""
        return np.load(self.file("choice.npy"))

    @property
    def counts(self) -> dict[str, Any]:
        """Documents, bytes, problems by name, and examples of them."""
        return json.loads(self.file("json").read_bytes())

    @property
    def cleaned(self) -> Record:
        """A record of the changes and removals by cleaning while the unit was read."""
        return Record.from_json(self.counts["cleaned"])

    @property
    def complete(self) -> bool:
        return self.file("json").exists()

    def choose(self, choice: NDArray[np.uint8]) -> None:
        # Written again when a preparation resumes, so it need not be complete after a crash.
        with writing(self.file("choice.npy")), open(self.file("choice.npy"), "wb") as file:
            save_array(file, choice)

    def documents(self, first: int, last: int, chosen: NDArray[np.bool_]) -> Iterator[tuple[Any, NDArray[np.int64]]]:
        """Yield the chosen documents of [first, last), as stored, with their lengths, in blocks of bounded size."""
        index = self.index
        text = np.memmap(self.file("text"), dtype=np.uint8, mode="r") if len(index) else np.empty(0, np.uint8)
        stops = np.cumsum(index["length"])
        begin = first
        while begin < last:
            start = stops[begin] - index["length"][begin]
            end = min(max(int(np.searchsorted(stops, start + _BLOCK, side="right")), begin + 1), last)
            wanted = chosen[begin:end]
            # Runs of wanted documents: copying a few long pieces is faster than copying many short ones.
            edges = begin + np.flatnonzero(np.diff(wanted, prepend=False, append=False))
            places = zip((stops - index["length"])[edges[0::2]], stops[edges[1::2] - 1], strict=True)
            pieces = [text[start:stop] for start, stop in places]
            block = pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint8), *pieces])
            yield block, index["length"][begin:end][wanted]
            begin = end

    def pick(self, places: Iterable[int]) -> Iterator[bytes]:
        """Yield some documents, one by one, without the final 0xFF."""
        lengths = self.index["length"]
        stops = np.cumsum(lengths)
        with open(self.file("text"), "rb") as file:
            for place in places:
                file.seek(int(stops[place] - lengths[place]))
                yield file.read(int(lengths[place]) - 1)

    @property
    def scores(self) -> NDArray[np.float32]:
        """Per document its score; nan if it has none."""
        return np.load(self.file("scores.npy"), mmap_mode="r")

    def file(self, suffix: str) -> Path:
        """Return the path of a file of this unit in the work folder."""
        return self.prefix.with_name(f"{self.prefix.name}.{suffix}")


def starts_of(units: Sequence[Gathered]) -> NDArray[np.int64]:
    """Return the number of the first document of each unit, counted over all units, followed by the number of
    documents.
    """
    return np.cumsum([0, *(len(unit.index) for unit in units)])
