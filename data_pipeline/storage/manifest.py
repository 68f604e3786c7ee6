"""manifest.json: the contents of a folder of prepared data. Written last, so a folder that has one is complete."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.storage.atomic import sha256_file, write_text
from data_pipeline.storage.shards import bin_path, given_path, idx_path, idx_size

MANIFEST_FILE = "manifest.json"
TOKENIZER_DIR = "tokenizer"
WORK_DIR = ".preparing"  # next to the shards until the manifest is written
LOCK_FILE = "lock"  # in WORK_DIR
SPLITS = ("train", "validation", "test")  # the last one is often empty

_FORMAT = "stlm-data"
_FORMAT_VERSION = 1
# Lists of integers in indented JSON, whose strings never contain a line end.
_ROWS_OF_NUMBERS = re.compile(r"\[\n\s*-?\d+(?:,\n\s*-?\d+)*\n\s*\]")


@dataclass(frozen=True)
class ShardEntry:
    """One shard, as the manifest describes it."""

    path: str  # relative to the folder, without .bin and .idx: "train/shard_00000"
    ids: int  # end_of_text included
    documents: int
    bytes: int  # of text, as UTF-8; end_of_text counts none
    bin_sha256: str
    idx_sha256: str
    given_sha256: str | None = None  # of conversations: see `shards`

    @property
    def identity(self) -> list[Any]:
        """The values on which a training run depends."""
        return [self.ids, self.bin_sha256, self.idx_sha256, *([self.given_sha256] if self.given_sha256 else [])]


@dataclass(frozen=True)
class WrittenFile:
    """The size and hash of a file when it was written."""

    path: Path
    size: int
    sha256: str

    def problem(self, hashes: bool) -> str | None:
        """Return what is wrong with the file now, by its size, and with `hashes` also by its contents; None if nothing
        is.
        """
        try:
            actual = self.path.stat().st_size
            if actual != self.size:
                kind = "cut short" if actual < self.size else "too long"
                return f"{self.path} is {kind}: {number_of(actual, 'byte')}, expected {self.size:,}"
            if hashes and sha256_file(self.path) != self.sha256:
                return f"{self.path} is damaged: its sha256 is not the one recorded when it was written"
        except FileNotFoundError:
            return f"{self.path} is missing"
        except OSError as error:
            return f"{self.path} cannot be read: {error.strerror}"
        return None


@dataclass(frozen=True)
class Manifest:
    """The description of a folder of prepared data."""

    tokenizer: dict[str, Any]  # spec, vocab_size, dtype, fingerprint
    splits: dict[str, list[ShardEntry]]
    sources: list[dict[str, Any]]  # per source: name, kind, amount read, and counts of problems
    split_rule: dict[str, Any]
    duplicates: dict[str, int]  # number and bytes of documents left out as equal to an earlier one
    settings: dict[str, Any]  # requested settings: the same ones on the same input give the same folder
    # steps: the selected ones; edits: counts of changes; removed: by rule, documents, bytes and examples.
    cleaning: dict[str, Any] = field(default_factory=dict)
    statistics: list[dict[str, Any]] = field(default_factory=list)  # per source: see `statistics.describe_source`

    @property
    def fingerprint(self) -> str:
        """The sha256 of everything that a training run depends on:

        the format, the tokenizer, and the contents of every shard in order.
        """
        identity = {
            "format": [_FORMAT, _FORMAT_VERSION],
            "tokenizer": self.tokenizer["fingerprint"],
            "dtype": self.tokenizer["dtype"],
            "splits": {name: [shard.identity for shard in self.splits[name]] for name in SPLITS if self._has(name)},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _has(self, split: str) -> bool:
        """Return whether a split belongs to the fingerprint: an empty test split does not, so older data keeps its
        fingerprint.
        """
        return split != "test" or bool(self.splits.get(split))

    def total(self, split: str, what: str) -> int:
        """Return the sum of `what` ("ids", "documents" or "bytes") over the shards of a split."""
        return sum(getattr(shard, what) for shard in self.splits.get(split, []))

    def save(self, directory: str | os.PathLike[str]) -> None:
        contents = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "fingerprint": self.fingerprint}
        text = json.dumps(contents | asdict(self), indent=1, ensure_ascii=False)
        write_text(
            Path(directory) / MANIFEST_FILE, _ROWS_OF_NUMBERS.sub(lambda found: _in_one_line(found[0]), text) + "\n"
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Manifest:
        """Read DIR/manifest.json. Raises DataError if it is missing, damaged, or of another format."""
        directory = Path(directory)
        path = directory / MANIFEST_FILE
        again = "prepare the data with scripts/preprocess.py"
        try:
            contents = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            if is_being_prepared(directory):
                raise DataError(
                    f"the data in {directory} is still being prepared by another process; wait until it has finished"
                ) from None
            if (directory / WORK_DIR).exists():
                raise DataError(
                    f"the data in {directory} is unfinished: its preparation was interrupted; "
                    f"repeat the same command to resume it"
                ) from None
            raise DataError(f"no prepared data in {directory}: {MANIFEST_FILE} is missing; {again}") from None
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}; {again} into another folder") from error
        if not isinstance(contents, dict) or contents.get("format") != _FORMAT:
            raise DataError(f"{path} is not the manifest of prepared data: it lacks the format {_FORMAT!r}")
        if contents.get("format_version") != _FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {contents.get('format_version')!r}, expected {_FORMAT_VERSION}; "
                f"{again} into another folder"
            )
        try:
            values = {one.name: contents[one.name] for one in fields(cls) if one.name in contents}
            values["splits"] = {
                name: [ShardEntry(**shard) for shard in shards] for name, shards in values["splits"].items()
            }
            manifest = cls(**values)
            intact = manifest.fingerprint == contents["fingerprint"]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged: {type(error).__name__} {error}; {again} into another folder"
            ) from error
        if not intact:
            raise DataError(
                f"{path} was changed or damaged: its fingerprint does not match its contents; {again} into "
                "another folder"
            )
        return manifest

    def check(self, directory: str | os.PathLike[str], hashes: bool = False) -> None:
        """Compare the size of every shard, and with `hashes` its sha256, with the recorded values.

        Raises one DataError that names every shard that differs.
        """
        found = [file.problem(hashes) for file in self.files(directory)]
        if problems := [problem for problem in found if problem]:
            raise DataError("\n".join([*problems, how_to_repair(directory)]))

    def files(self, directory: str | os.PathLike[str]) -> list[WrittenFile]:
        """Return all files of all shards."""
        itemsize = np.dtype(self.tokenizer["dtype"]).itemsize
        files = []
        for shard in (shard for split in SPLITS for shard in self.splits.get(split, [])):
            prefix = Path(directory) / shard.path
            files.append(WrittenFile(bin_path(prefix), shard.ids * itemsize, shard.bin_sha256))
            files.append(WrittenFile(idx_path(prefix), idx_size(shard.documents), shard.idx_sha256))
            if shard.given_sha256 is not None:
                files.append(WrittenFile(given_path(prefix), shard.ids, shard.given_sha256))
        return files


def is_being_prepared(directory: str | os.PathLike[str]) -> bool:
    """Return whether a process holds the lock of a preparation. False if the file system cannot lock."""
    try:
        with open(Path(directory) / WORK_DIR / LOCK_FILE, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def how_to_repair(directory: str | os.PathLike[str]) -> str:
    """Return instructions for repairing a damaged folder, as the end of a message."""
    return f"delete {directory} and prepare the data again, or restore the file from a copy"


def _in_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("[ ", "[").replace(" ]", "]")
