"""Plans: windows that no formula gives, computed once and stored.

    DIR/plans/best_fit-512/plan.json      its purpose, and the number of ids and positions
                           pieces.npy     padded and best_fit: the parts of documents, window after window
                           firsts.npy     the first piece of each window, and the number of pieces
                           ranking.npy    curriculum: all windows, those of the lowest tenth first, and so on

A document, preceded by end_of_text, is cut into windows of `context_length` positions. A part that fills a window has
it alone. A shorter one gets its own window (padded) or shares one with others (best_fit). All files are memory-mapped
for writing and reading: no step holds more than a block of documents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import CURRICULA, PACKINGS
from data_pipeline.errors import DataError
from data_pipeline.loading.best_fit import RunningNumbers, Slots, best_fit_decreasing
from data_pipeline.loading.prepared_data import PreparedData, is_small
from data_pipeline.preparation.scores import open_scores
from data_pipeline.progress import Progress
from data_pipeline.storage.atomic import atomic_directory, sha256_file, write_errors_as
from data_pipeline.storage.manifest import WrittenFile

PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("continues", "<i4")])
PLANS_DIR = "plans"

_FORMAT, _FORMAT_VERSION = "stlm-plan", 1
_GROUPS = 10  # of a curriculum
_SAMPLE = 1 << 20  # windows that determine the borders between groups
_BLOCK = 1 << 18  # approximate number of windows that a block of documents spans


@dataclass(frozen=True)
class PlanSummary:
    """plan.json: the purpose of a plan and its totals."""

    data_fingerprint: str
    packing: str
    context_length: int
    curriculum: str | None
    windows: int
    positions: int  # windows · context_length
    ids: int  # predicted ones
    edges: list[int]  # of a curriculum: start of each group of windows in ranking.npy, and their number
    files: dict[str, dict[str, Any]]  # bytes and sha256 of each file

    @property
    def wasted_share(self) -> float:
        """The share of positions at which nothing is predicted: padding, and ids that are only read."""
        return 1 - self.ids / self.positions


@dataclass(frozen=True)
class Plan:
    """A plan, mapped into memory."""

    summary: PlanSummary
    pieces: NDArray[Any] | None  # PIECE
    firsts: NDArray[np.int64] | None
    ranking: NDArray[np.int64] | None

    @property
    def edges(self) -> NDArray[np.int64]:
        return np.array(self.summary.edges, dtype=np.int64)

    @classmethod
    def open(
        cls, data: PreparedData, packing: str, context_length: int, curriculum: str | None, verify: bool | None = False
    ) -> Plan:
        """Open a plan after checking the sizes of its files, and with `verify` their sha256.

        `verify` None: only if the files are small enough for this to take a moment. Raises DataError, with the command
        that makes the plan, if it is missing, damaged or belongs to other data.
        """
        directory = plan_dir(data.dir, packing, context_length, curriculum)
        command = f"python scripts/preprocess.py plan {data.dir} --packing {packing} --context-length {context_length}"
        command += f" --curriculum {curriculum}" if curriculum else ""
        try:
            contents = json.loads((directory / "plan.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{data.dir} has no plan for these windows; make it: {command}") from None
        except ValueError as error:
            raise DataError(f"{directory}/plan.json is damaged: {error}; make it again: {command}") from error
        if not isinstance(contents, dict) or (contents.pop("format", 0), contents.pop("format_version", 0)) != (
            _FORMAT,
            _FORMAT_VERSION,
        ):
            raise DataError(f"{directory}/plan.json is of another version; make it again: {command}")
        contents.pop("wasted_share")
        summary = PlanSummary(**contents)
        if summary.data_fingerprint != data.fingerprint:
            raise DataError(f"{directory} was made for other data than {data.dir} holds now; make it again: {command}")
        if verify is None:
            verify = is_small(sum(expected["bytes"] for expected in summary.files.values()))
        for name, expected in summary.files.items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != expected["bytes"]:
                raise DataError(f"{path} is missing or cut short; make it again: {command}")
            if verify and sha256_file(path) != expected["sha256"]:
                raise DataError(f"{path} is damaged: its sha256 is not the one in plan.json; make it again: {command}")
        arrays = {name: _mapped(directory / f"{name}.npy") for name in ("pieces", "firsts", "ranking")}
        return cls(summary, **arrays)


def plan_dir(data_dir: Path, packing: str, context_length: int, curriculum: str | None) -> Path:
    """Return the folder of a plan: DIR/plans/best_fit-512, DIR/plans/stream-512-by-length."""
    return data_dir / PLANS_DIR / (f"{packing}-{context_length}" + (f"-by-{curriculum}" if curriculum else ""))


def plan_files(data_dir: Path) -> list[WrittenFile]:
    """Return the files of all plans of prepared data. Raises DataError if the description of a plan cannot be read."""
    files = []
    for path in sorted((data_dir / PLANS_DIR).glob("*/plan.json")):
        try:
            described = json.loads(path.read_bytes())["files"]
            files += [WrittenFile(path.with_name(name), one["bytes"], one["sha256"]) for name, one in described.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}; make the plan again with preprocess.py plan") from error
    return files


@write_errors_as(DataError)
def write_plan(data: PreparedData, packing: str, context_length: int, curriculum: str | None = None) -> PlanSummary:
    """Plan the training windows of `data`, and write the plan where runs look for it, replacing an earlier one.

    The packings stream and documents need no plan without a curriculum; for them only the summary is computed. Raises
    DataError for an unknown packing or curriculum, or if the data lacks scores.
    """
    if packing not in PACKINGS or curriculum not in (None, *CURRICULA):
        raise DataError(
            f"got packing {packing!r} and curriculum {curriculum!r}, expected one of {', '.join(PACKINGS)}, and of "
            f"{', '.join(CURRICULA)}"
        )
    if context_length < 2:
        raise DataError(f"the context length must be at least 2, got {context_length}")
    planner = _Planner(data, packing, context_length, curriculum)
    if curriculum is None and packing in ("stream", "documents"):
        return planner.summary([], {})
    with atomic_directory(plan_dir(data.dir, packing, context_length, curriculum)) as directory:
        edges = planner.write(directory)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(directory.glob("*.npy"))
        }
        summary = planner.summary(edges, files)
        description = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(summary)}
        description["wasted_share"] = summary.wasted_share
        (directory / "plan.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return summary


class _Block(NamedTuple):
    """Some consecutive documents of the stream."""

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]  # ids, end_of_text included
    scores: NDArray[np.float64]


class _Parts(NamedTuple):
    """Parts of documents, each within one window."""

    windows: NDArray[np.int64]
    pieces: NDArray[np.int64]  # index of each in pieces.npy
    starts: NDArray[np.int64]  # in the stream
    lengths: NDArray[np.int64]
    continues: NDArray[np.bool_]  # not the beginning of its document
    scores: NDArray[np.float64]  # of its document


class _Planner:
    """Builder of a plan. It passes over all documents once to count, and once or twice to write."""

    def __init__(self, data: PreparedData, packing: str, context_length: int, curriculum: str | None) -> None:
        self._data, self._packing, self._context_length, self._curriculum = data, packing, context_length, curriculum
        self._stream = data.split("train")
        if packing in ("stream", "documents"):
            self.windows = -(-len(self._stream) // context_length)
            return
        full, counts = 0, np.zeros(context_length, dtype=np.int64)
        for block in self._blocks("counting"):
            parts, rest = self._cut(block.sizes)
            full += int((parts - 1).sum())
            counts += np.bincount(self._room(parts, rest), minlength=context_length)
        if packing == "padded":
            self.windows = self.pieces = full + int(counts.sum())
            return
        self._full = full + int(counts[0])
        counts[0] = 0
        self._packed = best_fit_decreasing(counts.tolist(), context_length - 1)
        self._slots = Slots.of(self._packed, counts.tolist())
        self.windows = self._full + self._slots.num_windows
        self.pieces = self._full + self._slots.num_pieces

    def summary(self, edges: list[int], files: dict[str, dict[str, Any]]) -> PlanSummary:
        return PlanSummary(
            data_fingerprint=self._data.fingerprint,
            packing=self._packing,
            context_length=self._context_length,
            curriculum=self._curriculum,
            windows=self.windows,
            positions=self.windows * self._context_length,
            ids=len(self._stream),
            edges=edges,
            files=files,
        )

    def write(self, directory: Path) -> list[int]:
        """Write the files of the plan; return the edges of its groups, if any."""
        pieces = None
        if self._packing in ("padded", "best_fit"):
            pieces = _new(directory / "pieces.npy", PIECE, self.pieces)
            firsts = _new(directory / "firsts.npy", np.dtype("<i8"), self.windows + 1)
            if self._packing == "padded":
                firsts[:] = np.arange(self.windows + 1)
            else:
                firsts[: self._full] = np.arange(self._full)
                firsts[self._full :] = self._full + self._slots.firsts(self._packed)
        sums = counts = None
        if self._curriculum is not None:
            sums = _new(directory / "sums", np.dtype("<f8"), self.windows)
            counts = _new(directory / "counts", np.dtype("<i8"), self.windows)
        for parts in self._parts():
            if pieces is not None:
                pieces["start"][parts.pieces] = parts.starts
                pieces["length"][parts.pieces] = parts.lengths
                pieces["continues"][parts.pieces] = parts.continues
            if sums is not None and counts is not None:
                np.add.at(sums, parts.windows, parts.scores * parts.lengths)
                np.add.at(counts, parts.windows, parts.lengths)
        if sums is None or counts is None:
            return []
        sums /= counts
        edges = _rank(sums, directory)
        for name in ("sums", "counts"):
            (directory / name).unlink()
        return edges

    def _parts(self) -> Iterator[_Parts]:
        cut = self._cut_stream if self._packing in ("stream", "documents") else self._cut_documents
        yield from cut()

    def _cut_stream(self) -> Iterator[_Parts]:
        length = self._context_length
        for block in self._blocks("planning"):
            stops = block.starts + block.sizes
            first, last = block.starts // length, (stops - 1) // length
            document, number = _expand(last - first + 1)
            windows = first[document] + number
            starts = np.maximum(windows * length, block.starts[document])
            lengths = np.minimum((windows + 1) * length, stops[document]) - starts
            yield _Parts(windows, windows, starts, lengths, number > 0, block.scores[document])

    def _cut_documents(self) -> Iterator[_Parts]:
        length = self._context_length
        alone = 0  # windows of one piece so far
        ranks = RunningNumbers(length)
        for block in self._blocks("planning"):
            parts, rest = self._cut(block.sizes)
            document, number = _expand(parts)
            starts = np.maximum(number * length - 1, 0)
            lengths = np.minimum((number + 1) * length - 1, block.sizes[document]) - starts
            windows = np.empty(len(document), dtype=np.int64)
            pieces = windows
            shared = np.zeros(len(document), dtype=np.bool_)
            if self._packing == "best_fit":
                room = self._room(parts, rest)
                shared = (number == parts[document] - 1) & (room > 0)[document]
                pieces = np.empty(len(document), dtype=np.int64)
                found = self._slots.place(room[room > 0], ranks(room[room > 0]))
                windows[shared], pieces[shared] = self._full + found[0], self._full + found[1]
            single = np.flatnonzero(~shared)
            windows[single] = pieces[single] = alone + np.arange(len(single))
            alone += len(single)
            yield _Parts(windows, pieces, block.starts[document] + starts, lengths, number > 0, block.scores[document])

    def _cut(self, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of windows of each document, with the preceding end_of_text, and the positions in the last
        one.
        """
        parts = sizes // self._context_length + 1
        return parts, sizes + 1 - (parts - 1) * self._context_length

    def _room(self, parts: NDArray[np.int64], rest: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions that the last part of each document takes, of the context_length - 1 that pieces share.

        A beginning takes its ids: the end_of_text of the previous document precedes it, or at the start of a window an
        extra one. A continuation takes an extra position for the start symbol. 0: it needs a whole window.
        """
        room = np.where(parts == 1, rest - 1, rest + 1)
        return np.where(room < self._context_length, room, 0)

    def _blocks(self, what: str) -> Iterator[_Block]:
        stream = self._stream
        start = 0
        with Progress(total=stream.num_documents, desc=what, unit=" documents", unit_scale=True, delay=1) as bar:
            for sizes, scores in zip(stream.document_sizes(), self._scores(), strict=True):
                pending = np.cumsum(sizes // self._context_length + 1)
                begin = 0
                while begin < len(sizes):
                    before = pending[begin - 1] if begin else 0
                    end = max(int(np.searchsorted(pending, before + _BLOCK, side="right")), begin + 1)
                    mine = sizes[begin:end].astype(np.int64)
                    stops = start + np.cumsum(mine)
                    score = mine if scores is None else scores[begin:end]
                    yield _Block(stops - mine, mine, score.astype(np.float64))
                    start = int(stops[-1])
                    bar.update(end - begin)
                    begin = end

    def _scores(self) -> Iterator[NDArray[np.float32] | None]:
        """Yield the scores of the documents of each shard; None if their length is the score."""
        scores = None
        if self._curriculum == "score":
            scores = open_scores(self._data.dir, self._stream.num_documents)
        first = 0
        for shard in self._data.manifest.splits["train"]:
            yield None if scores is None else scores[first : first + shard.documents]
            first += shard.documents


def _expand(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return 0 counts[0] times, 1 counts[1] times, …; and with it 0, 1, 2 …, restarting for each."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _rank(scores: NDArray[np.float64], directory: Path) -> list[int]:
    """Write ranking.npy: windows in groups of rising score, in number order within each. Return the groups' edges."""
    sample = np.sort(scores[:: -(-len(scores) // _SAMPLE)])
    borders = np.unique(sample[[len(sample) * group // _GROUPS for group in range(1, _GROUPS)]])
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(scores), _BLOCK)]
    sizes = np.zeros(len(borders) + 1, dtype=np.int64)
    for block in blocks:
        sizes += np.bincount(np.searchsorted(borders, scores[block], side="right"), minlength=len(sizes))
    edges = np.concatenate([[0], np.cumsum(sizes)])
    ranking = _new(directory / "ranking.npy", np.dtype("<i8"), len(scores))
    ranks = RunningNumbers(len(sizes))
    for block in blocks:
        groups = np.searchsorted(borders, scores[block], side="right")
        ranking[edges[groups] + ranks(groups)] = np.arange(block.start, block.start + len(groups))
    return np.unique(edges).tolist()


def _new(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    with path.open("r+b") as file:  # or a full disk would end the process, by a signal, where the map is written to
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _mapped(path: Path) -> Any:
    return np.load(path, mmap_mode="r") if path.is_file() else None
