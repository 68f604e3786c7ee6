r"""One shard: the ids of many documents in `PREFIX.bin`, and the position of each document in `PREFIX.idx`.

This is Megatron's indexed format, "MMIDIDX", which Megatron-DeepSpeed, GPT-NeoX and DeepSpeed's MMapIndexedDataset
read. All numbers are little-endian:

    .bin  the ids, one document after another
    .idx  9 bytes "MMIDIDX\0\0" | uint64 version = 1 | uint8 type code | uint64 sequences S | uint64 entries E
          int32 [S] ids of each sequence | int64 [S] byte offset of each sequence in .bin
          int64 [E] first sequence of each document, and S

In files written by this package, a document and its end_of_text are one sequence, so E = S + 1.

Conversations have a third file, PREFIX.given: a byte for each id, 1 if it is only read and does not count in the loss.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.storage.atomic import atomic_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")

# Up to code 5 all programs agree. Megatron-LM and GPT-NeoX write uint16 as 8, where DeepSpeed means uint64, and
# DeepSpeed writes it as 6; the size of the .bin file decides. Their floating-point types hold no ids.
_TYPES: dict[int, tuple[str, ...]] = {
    1: ("u1",),
    2: ("i1",),
    3: ("<i2",),
    4: ("<i4",),
    5: ("<i8",),
    6: ("<u2",),
    7: ("<u4",),
    8: ("<u2", "<u8"),
}
_WRITTEN_CODES = {np.dtype(_TYPES[code][0]): code for code in (1, 3, 4)}
_BLOCK = 1 << 20  # index entries written at a time


@dataclass(frozen=True)
class WrittenShard:
    """The result of `write_shard`: the size, and the sha256 of each file in hex."""

    ids: int
    documents: int
    bin_sha256: str
    idx_sha256: str
    given_sha256: str | None = None


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the file of ids of a shard: PREFIX.bin."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the index file of a shard: PREFIX.idx."""
    return Path(f"{os.fspath(prefix)}.idx")


def given_path(prefix: str | os.PathLike[str]) -> Path:
    """Return the file that marks the given ids of a shard: PREFIX.given."""
    return Path(f"{os.fspath(prefix)}.given")


def idx_size(documents: int) -> int:
    """Return the bytes of the .idx file of a shard with that many documents, as written by this package."""
    return _HEADER.size + 12 * documents + 8 * (documents + 1)


def write_shard(
    prefix: str | os.PathLike[str],
    dtype: np.dtype[Any],
    blocks: Iterable[tuple[NDArray[Any], ...]],
    with_given: bool = False,
) -> WrittenShard:
    """Write PREFIX.bin and PREFIX.idx, the latter last, each atomically; `with_given` PREFIX.given before PREFIX.idx.

    blocks: ids of any number of consecutive whole documents, the number of ids of each document, and `with_given` a
    mask of the given ids. Blocks are written as they arrive; only the counts stay in memory. Raises WriteError if
    the disk is full or may not be written.
    """
    counts_so_far: list[NDArray[np.int32]] = []
    with ExitStack() as files:
        out = _Hashing(files.enter_context(atomic_file(bin_path(prefix))))
        beside = _Hashing(files.enter_context(atomic_file(given_path(prefix)))) if with_given else None
        for ids, counts, *given in blocks:
            assert ids.dtype == dtype and ids.size == counts.sum()
            out.write(np.ascontiguousarray(ids))
            if beside is not None:
                beside.write(np.ascontiguousarray(given[0], dtype=np.uint8))
            counts_so_far.append(counts.astype(np.int32))
    sizes = np.concatenate([np.empty(0, np.int32), *counts_so_far])

    with atomic_file(idx_path(prefix)) as file:
        index = _Hashing(file)
        index.write(_HEADER.pack(_MAGIC, 1, _WRITTEN_CODES[dtype], len(sizes), len(sizes) + 1))
        index.write(sizes)
        offset = 0
        for start in range(0, len(sizes), _BLOCK):
            ends = offset + np.cumsum(sizes[start : start + _BLOCK], dtype=np.int64) * dtype.itemsize
            index.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64))
            offset = int(ends[-1])
        for start in range(0, len(sizes) + 1, _BLOCK):
            index.write(np.arange(start, min(start + _BLOCK, len(sizes) + 1), dtype=np.int64))
    return WrittenShard(
        offset // dtype.itemsize, len(sizes), out.sha256, index.sha256, beside.sha256 if beside is not None else None
    )


class Shard:
    """An indexed file, of this package or another program, mapped into memory.

    `ids`: all ids in sequence. `sizes`: ids of each sequence. `documents`: first sequence of each document, followed by
    the number of sequences.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Raise DataError if a file is missing, cut short, or not in this format."""
        path = idx_path(prefix)
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
            available = path.stat().st_size
            bin_bytes = bin_path(prefix).stat().st_size
        except FileNotFoundError as error:
            raise DataError(f"shard {prefix} is incomplete: {error.filename} is missing") from None
        if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
            raise DataError(f"{path} is not an index in Megatron's format: it does not begin with MMIDIDX")
        _, version, code, num_sequences, num_entries = _HEADER.unpack(header)
        if version != 1 or code not in _TYPES:
            raise DataError(f"{path}: version {version} with type code {code} is not supported")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_entries
        if available != expected:
            raise DataError(f"{path} is damaged: {number_of(available, 'byte')}, expected {expected:,}")

        index = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
        offsets_at = _HEADER.size + 4 * num_sequences
        entries_at = offsets_at + 8 * num_sequences
        self.sizes: NDArray[np.int32] = index[_HEADER.size : offsets_at].view("<i4")
        self.documents: NDArray[np.int64] = index[entries_at:].view("<i8")

        num_ids = int(self.sizes.sum(dtype=np.int64))
        fitting = [name for name in _TYPES[code] if num_ids * np.dtype(name).itemsize == bin_bytes]
        if not fitting:
            wanted = num_ids * np.dtype(_TYPES[code][0]).itemsize
            size = number_of(bin_bytes, "byte")
            raise DataError(f"{bin_path(prefix)} is damaged: {size}, expected {wanted:,} by its index")
        self.dtype = np.dtype(fitting[0])
        self.ids: NDArray[Any] = map_ids(prefix, self.dtype)

    def __len__(self) -> int:
        return len(self.documents) - 1

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yield the ids of each document."""
        start = 0
        for first, last in zip(self.documents[:-1].tolist(), self.documents[1:].tolist(), strict=True):
            stop = start + int(self.sizes[first:last].sum(dtype=np.int64))
            yield self.ids[start:stop]
            start = stop


def map_ids(prefix: str | os.PathLike[str], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the ids of PREFIX.bin, mapped into memory, read-only."""
    path = bin_path(prefix)
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


class _Hashing:
    """A file wrapper that computes the sha256 of the data written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes | NDArray[Any]) -> None:
        if len(data):
            buffer = data if isinstance(data, bytes) else data.data
            self._file.write(buffer)
            self._digest.update(buffer)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
