"""The second half of preparing data: a tokenizer, and shards of ids, from the gathered documents.

The division of documents into shards depends on their text alone, so the shards are the same regardless of the
processes that make them and their order. Encoding jobs are smaller than shards, so that all processes stay busy to the
end.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_pipeline.sources.conversations import encode_conversations
from data_pipeline.sources.indexed import ids_of_kept
from data_pipeline.storage.atomic import atomic_file, save_array, write_text
from data_pipeline.storage.documents import CHOICES, TRAIN, Gathered
from data_pipeline.storage.manifest import ShardEntry
from data_pipeline.storage.shards import write_shard
from data_pipeline.tokenizers import (
    ALGORITHMS,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
    parse_spec,
    train_sentencepiece,
)
from data_pipeline.tokenizers.base import TOKENIZER_FILE

SHARD_BYTES = 256 << 20  # of text
PIECE_BYTES = 4 << 20  # of text encoded per job: small, so that processes do not wait long for the last one

_SAMPLE_BYTES = 16 << 20  # of text that a tokenizer is trained on


@dataclass(frozen=True)
class ShardPlan:
    """The contents of one shard: from some units, the documents chosen for a split among [first, last)."""

    split: str
    number: int
    parts: tuple[tuple[Gathered, int, int], ...]
    stored_bytes: int  # of its documents

    @property
    def path(self) -> str:
        return f"{self.split}/shard_{self.number:05d}"

    @property
    def name(self) -> str:
        """The name of its files in the work folder."""
        return f"{self.split}_{self.number:05d}"

    def pieces(self) -> list[ShardPlan]:
        """Return the same documents as several plans of about PIECE_BYTES each."""
        pieces = []
        for unit, first, last in self.parts:
            chosen = unit.choice[first:last] == CHOICES[self.split]
            stops = np.cumsum(np.where(chosen, unit.index["length"][first:last], 0))
            cuts = np.flatnonzero(np.diff((stops - 1) // PIECE_BYTES)) + 1
            for begin, end in pairwise([0, *cuts.tolist(), last - first]):
                size = int(stops[end - 1] - (stops[begin - 1] if begin else 0))
                pieces.append(replace(self, parts=((unit, first + begin, first + end),), stored_bytes=size))
        return pieces

    def documents(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        for unit, first, last in self.parts:
            yield from unit.documents(first, last, unit.choice == CHOICES[self.split])


def plan_shards(units: Sequence[Gathered], split: str) -> list[ShardPlan]:
    """Fill one shard after the other: if all documents are laid end to end, a document belongs to the shard of its
    first byte.
    """
    parts: dict[int, list[tuple[Gathered, int, int]]] = {}
    sizes: Counter[int] = Counter()
    before = 0
    for unit in units:
        places = np.flatnonzero(unit.choice == CHOICES[split])
        lengths = unit.index["length"][places]
        numbers = (before + np.cumsum(lengths) - lengths) // SHARD_BYTES
        cuts = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist()
        for begin, end in pairwise(cuts):
            number = int(numbers[begin])
            parts.setdefault(number, []).append((unit, int(places[begin]), int(places[end - 1]) + 1))
            sizes[number] += int(lengths[begin:end].sum())
        before += int(lengths.sum())
    # A document longer than a shard leaves the numbers that it spans unused.
    return [ShardPlan(split, new, tuple(parts[old]), sizes[old]) for new, old in enumerate(sorted(parts))]


def encode_piece(piece: ShardPlan, tokenizer_dir: Path, path: Path, conversations: bool) -> None:
    """Write a file with the number of ids of each document of a piece, followed by all its ids.

    conversations: documents are stored as such; the file ends with a mark for each id that is given.
    """
    tokenizer = _tokenizer(tokenizer_dir)
    ids: list[np.ndarray] = [np.empty(0, tokenizer.dtype)]
    counts: list[np.ndarray] = [np.empty(0, np.int64)]
    given: list[np.ndarray] = [np.empty(0, np.bool_)]
    for stored, lengths in piece.documents():
        encoded = (
            encode_conversations(tokenizer, stored, lengths)
            if conversations
            else tokenizer.encode_documents(stored, lengths)
        )
        for parts, part in zip((ids, counts, given), encoded, strict=False):
            parts.append(part)
    with atomic_file(path) as file:
        save_array(file, np.concatenate(counts))
        save_array(file, np.concatenate(ids))
        if conversations:
            save_array(file, np.concatenate(given))


def write_planned(
    plan: ShardPlan,
    pieces: list[Path],
    output: Path,
    tokenizer_dir: Path,
    done: Path,
    keep_ids: bool,
    conversations: bool,
) -> ShardEntry:
    """Write one shard, and then the file `done` that records it. A shard whose `done` exists is not written again.

    pieces: files of `encode_piece` that together hold its ids; they are removed. Empty: the ids are the stored bytes.
    keep_ids: the gathered documents are ids of this tokenizer already: see `indexed`.
    """
    if done.exists():
        return ShardEntry(**json.loads(done.read_bytes()))
    tokenizer = _tokenizer(tokenizer_dir)
    stored_as_text = not (keep_ids or conversations)
    text_bytes = 0

    def blocks() -> Iterator[tuple[NDArray[Any], ...]]:
        nonlocal text_bytes
        for block in _from_pieces(pieces, conversations) if pieces else _from_documents(plan, tokenizer, keep_ids):
            if not stored_as_text:
                text_bytes += _bytes_of(block[0], tokenizer)
            yield block

    written = write_shard(output / plan.path, tokenizer.dtype, blocks(), conversations)
    if stored_as_text:
        text_bytes = plan.stored_bytes - written.documents
    entry = ShardEntry(path=plan.path, bytes=text_bytes, **asdict(written))
    write_text(done, json.dumps(asdict(entry)))
    for path in pieces:
        path.unlink()
    return entry


def _from_pieces(pieces: list[Path], conversations: bool) -> Iterator[tuple[NDArray[Any], ...]]:
    for path in pieces:
        with path.open("rb") as file:
            counts, ids, *given = (np.load(file) for _ in range(3 if conversations else 2))
        yield ids, counts, *given


def _from_documents(plan: ShardPlan, tokenizer: Tokenizer, keep_ids: bool) -> Iterator[tuple[NDArray[Any], ...]]:
    for stored, lengths in plan.documents():
        if keep_ids:
            yield ids_of_kept(stored, lengths, tokenizer.dtype)
        else:
            yield tokenizer.encode_documents(stored, lengths)


def _bytes_of(ids: NDArray[Any], tokenizer: Tokenizer) -> int:
    """Return the bytes of the text that `ids` stand for, from the count of each id."""
    return int(np.bincount(ids, minlength=tokenizer.vocab_size) @ tokenizer.bytes_per_id.astype(np.int64))


def _tokenizer(directory: Path) -> Tokenizer:
    return _loaded(directory, (directory / TOKENIZER_FILE).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _loaded(directory: Path, mtime_ns: int) -> Tokenizer:
    return load_tokenizer(directory)


def make_tokenizer(spec: str, units: Sequence[Gathered]) -> Tokenizer:
    """Return the tokenizer of a spec, trained if needed on up to 16 MiB of the documents for training."""
    kind, size = parse_spec(spec)
    if kind not in ALGORITHMS:
        return build_tokenizer(spec)
    tqdm.write(f"training the tokenizer {spec}; this takes a minute or less", file=sys.stderr)
    return train_sentencepiece(_sample(units), size, kind)


def _sample(units: Sequence[Gathered]) -> Iterator[str]:
    """Yield documents for training, all of them or an even sample by their hash; twice _SAMPLE_BYTES at most."""
    left = 2 * _SAMPLE_BYTES
    for text in _evenly(units):
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)
    if left == 2 * _SAMPLE_BYTES:  # a few long documents, none of which was sampled
        longest = max(units, key=lambda unit: np.max(unit.index["length"] * (unit.choice == TRAIN), initial=0))
        place = int(np.argmax(longest.index["length"] * (longest.choice == TRAIN)))
        text = next(longest.pick([place]))[:_SAMPLE_BYTES].decode("utf-8", errors="surrogateescape")
        yield from re.split("[\udcfe\udcff]", text)


def _evenly(units: Sequence[Gathered]) -> Iterator[str]:
    total = sum(int(unit.index["length"][unit.choice == TRAIN].sum()) for unit in units)
    limit = np.uint64(min(_SAMPLE_BYTES / max(total, 1), 1) * (2**64 - 2048))
    for unit in units:
        index = unit.index
        for stored, _ in unit.documents(0, len(index), (unit.choice == TRAIN) & (index["low"] <= limit)):
            text = stored.tobytes().decode("utf-8", errors="surrogateescape")
            yield from re.split("[\udcfe\udcff]", text)[:-1]  # of a conversation, each segment: see `conversations`
