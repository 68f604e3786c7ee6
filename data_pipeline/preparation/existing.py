"""Documents of finished data as gathered ones, for comparison with text that is appended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.cleaning.documents import Cleaning
from data_pipeline.preparation.encoding import CHOICES
from data_pipeline.preparation.gathering import Gathered, gather
from data_pipeline.preparation.holdout import HeldBack
from data_pipeline.preparation.workers import Team, run_all
from data_pipeline.sources.text_files import Problems
from data_pipeline.storage.manifest import TOKENIZER_DIR, Manifest
from data_pipeline.storage.shards import Shard
from data_pipeline.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Existing:
    """Finished data to which text is added."""

    directory: Path
    manifest: Manifest

    @property
    def share(self) -> HeldBack:
        """The number and bytes of its documents, and of those held back for validation."""
        train, held = (
            (self.manifest.total(split, "documents"), self.manifest.total(split, "bytes"))
            for split in ("train", "validation")
        )
        return HeldBack(train[0] + held[0], train[1] + held[1], *held)

    def gathered(self, work: Path, as_ids: bool, team: Team) -> list[tuple[Gathered, int]]:
        """Gather its documents in a work folder, one unit per shard; return each unit with its split.

        as_ids: the documents stay ids, as stored; else they are decoded to text.
        """
        units, found = [], []
        for split, shards in self.manifest.splits.items():
            for shard in shards:
                place = Gathered(work / f"existing_{shard.path.replace('/', '_')}")
                units.append((_Shard(0, shard.bytes, self.directory, shard.path, as_ids), place, Cleaning()))
                found.append((place, CHOICES[split]))
        missing = [job for job in units if not job[1].complete]
        run_all("reading what is there", gather, missing, [unit.size for unit, *_ in missing], team)
        return found


@dataclass(frozen=True)
class _Shard:
    """The documents of a shard."""

    source: int
    size: int
    directory: Path
    path: str
    as_ids: bool

    def read(self, problems: Problems) -> Iterator[bytes]:
        tokenizer = load_tokenizer(self.directory / TOKENIZER_DIR)
        shard = Shard(self.directory / self.path)
        for ids in shard:
            yield ids.tobytes() if self.as_ids else tokenizer.decode_bytes(ids)
