"""The first half of preparing data: all documents in one place, and the choice of a split for each.

Each unit of the sources becomes three files of the work folder: `.text`, its documents as UTF-8, each followed by one
byte 0xFF; `.index.npy`, the length and hash of each; `.json`, written last, the counts. Later steps read only these, so
a source is read once, and every decision about documents can consider all of them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from data_pipeline.cleaning.documents import Cleaner, Cleaning
from data_pipeline.cleaning.record import Record
from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.preparation.workers import Team, run_all
from data_pipeline.sources.conversations import END_OF_STORED_SEGMENT
from data_pipeline.sources.limit import Limit
from data_pipeline.sources.plain_text import LONGEST_DOCUMENT
from data_pipeline.sources.source import Unit
from data_pipeline.sources.text_files import Problems, is_blank
from data_pipeline.storage.atomic import atomic_file, save_array, write_text, writing
from data_pipeline.storage.manifest import TOKENIZER_DIR, Manifest
from data_pipeline.storage.shards import Shard
from data_pipeline.tokenizers import load_tokenizer
from data_pipeline.tokenizers.base import END_OF_STORED_DOCUMENT

DROPPED, TRAIN, VALIDATION, TEST = 0, 1, 2, 3
CHOICES = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
REMOVED = "removed.jsonl"  # file of a unit that lists the documents left out by cleaning

_INDEX = np.dtype([("length", "<i8"), ("high", "<u8"), ("low", "<u8")])
_SORTED_AT_A_TIME = 1 << 22  # documents; bounds the memory of the search for duplicates
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


def gather(
    unit: Unit, gathered: Gathered, cleaning: Cleaning, list_removed: bool = False, limit: Limit | None = None
) -> None:
    """Read a unit, clean its documents, and write its files. Raises DataError for user errors: see the sources.

    list_removed: also write the documents that the steps leave out, one line of JSON each, with the rule. limit: stop
    before the document that would exceed it; `full` in the counts records that.
    """
    problems = Problems()
    cleaner = Cleaner(cleaning)
    lengths, scores, hashes = array("q"), array("f"), bytearray()
    end, mark, marks = bytes([END_OF_STORED_DOCUMENT]), bytes([END_OF_STORED_SEGMENT]), 0
    size, full = 0, False
    removed_list = atomic_file(gathered.file(REMOVED)) if list_removed else nullcontext()
    with atomic_file(gathered.file("text")) as file, removed_list as removed:
        for raw in unit.read(problems):
            if is_blank(raw):
                problems.count("empty_documents")
                continue
            if len(raw) > LONGEST_DOCUMENT:
                length = number_of(len(raw), "byte")
                raise DataError(f"a document of {length} is too long; the limit is {LONGEST_DOCUMENT:,}")
            document = cleaner(raw)
            if document is None:
                if removed is not None:
                    removed.write(orjson.dumps({"rule": cleaner.rule, "text": raw.decode("utf-8")}) + b"\n")
                continue
            if limit is not None and not limit.allows(len(lengths) + 1, size := size + len(document)):
                full = True
                break
            if mark in document:  # a search is several times as fast as a count
                marks += document.count(mark)
            file.write(document + end)
            lengths.append(len(document) + 1)
            scores.append(problems.score)
            hashes += hashlib.blake2b(document, digest_size=16).digest()
    index = np.empty(len(lengths), dtype=_INDEX)
    index["length"] = lengths
    index["high"], index["low"] = np.frombuffer(hashes, dtype="<u8").reshape(-1, 2).T
    with atomic_file(gathered.file("index.npy")) as file:
        save_array(file, index)
    with atomic_file(gathered.file("scores.npy")) as file:
        save_array(file, np.array(scores))
    counts = {"documents": len(lengths), "bytes": sum(lengths) - len(lengths) - marks}
    write_text(
        gathered.file("json"),
        json.dumps(
            {
                **counts,
                "full": full,
                "problems": dict(problems.counts),
                "examples": problems.examples,
                "left_out": problems.left_out,
                "division": dict(problems.division),
                "cleaned": cleaner.record.to_json(),
            }
        ),
    )


def gather_finished(
    directory: Path, manifest: Manifest, work: Path, as_ids: bool, team: Team
) -> list[tuple[Gathered, int]]:
    """Gather the documents of finished data in a work folder, one unit per shard; return each unit with its choice.

    as_ids: the documents stay ids, as stored; else they are decoded to text.
    """
    jobs, found = [], []
    for split, shards in manifest.splits.items():
        for shard in shards:
            place = Gathered(work / f"existing_{shard.path.replace('/', '_')}")
            jobs.append((_ShardUnit(0, shard.bytes, directory, shard.path, as_ids), place, Cleaning()))
            found.append((place, CHOICES[split]))
    missing = [job for job in jobs if not job[1].complete]
    run_all("reading the existing data", gather, missing, [unit.size for unit, *_ in missing], team)
    return found


@dataclass(frozen=True)
class _ShardUnit:
    """The documents of a shard."""

    source: int
    size: int
    directory: Path
    path: str
    as_ids: bool

    def read(self, problems: Problems) -> Iterator[bytes]:
        tokenizer = load_tokenizer(self.directory / TOKENIZER_DIR)
        for ids in Shard(self.directory / self.path):
            yield ids.tobytes() if self.as_ids else tokenizer.decode_bytes(ids)


def drop_duplicates(units: Sequence[Gathered], kept: NDArray[np.bool_]) -> None:
    """Clear `kept`, which covers all units, for every document that equals an earlier one.

    Sorts in passes by the leading bits of the hash; each pass holds all documents that could be equal.
    """
    starts = starts_of(units)
    passes = 1 << max(0, (int(starts[-1]) // _SORTED_AT_A_TIME).bit_length())
    for bucket in range(passes):
        kept[_later_duplicates(units, starts, bucket, passes)] = False


def starts_of(units: Sequence[Gathered]) -> NDArray[np.int64]:
    """Return the number of the first document of each unit, counted over all units, followed by the number of
    documents.
    """
    return np.cumsum([0, *(len(unit.index) for unit in units)])


def _later_duplicates(
    units: Sequence[Gathered], starts: NDArray[np.int64], bucket: int, passes: int
) -> NDArray[np.int64]:
    """Return the documents, numbered over all units, that equal an earlier one, within one bucket of hashes."""
    high, low, numbers = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for number, unit in enumerate(units):
        index = unit.index
        places = np.flatnonzero((index["high"] & np.uint64(passes - 1)) == bucket)
        high.append(index["high"][places])
        low.append(index["low"][places])
        numbers.append(places + starts[number])
    highs, lows, all_numbers = np.concatenate(high), np.concatenate(low), np.concatenate(numbers)
    order = np.lexsort((lows, highs))  # stable: equal documents keep their order, and the first of them stays
    equal = (highs[order][1:] == highs[order][:-1]) & (lows[order][1:] == lows[order][:-1])
    return all_numbers[order[1:][equal]]
