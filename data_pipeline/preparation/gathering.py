"""The first half of preparing data: all documents in one place, cleaned one by one.

Every unit of the sources is read once, into files of the work folder: see `storage.documents`. Later steps read only
these, so every decision about documents can consider all of them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from data_pipeline.cleaning.documents import Cleaner, Cleaning
from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.preparation.workers import Team, run_all
from data_pipeline.sources.conversations import END_OF_STORED_SEGMENT
from data_pipeline.sources.limit import Limit
from data_pipeline.sources.plain_text import LONGEST_DOCUMENT
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.source import Unit
from data_pipeline.sources.text_files import is_blank
from data_pipeline.storage.atomic import atomic_file, save_array, write_text
from data_pipeline.storage.documents import CHOICES, INDEX, REMOVED, Gathered
from data_pipeline.storage.manifest import TOKENIZER_DIR, Manifest
from data_pipeline.storage.shards import Shard
from data_pipeline.tokenizers import load_tokenizer
from data_pipeline.tokenizers.base import END_OF_STORED_DOCUMENT


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
    index = np.empty(len(lengths), dtype=INDEX)
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
