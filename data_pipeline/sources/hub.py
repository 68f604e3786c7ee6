"""Data sets of the Hugging Face hub, and folders written by `save_to_disk`, read with the `datasets` library.

That library, and the modules for network checks, are imported on first use, because every worker imports this file.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, first_line
from data_pipeline.sources.files import state_of
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.text_files import clean, column_of, value_at

_HUB_ROWS = 1 << 16  # in one unit
_DATASET_FILES = ("state.json", "dataset_info.json")
_SPLITS_FILE = "dataset_dict.json"


@dataclass(frozen=True)
class Rows:
    """The location and options of the rows: all that a worker needs to read them."""

    name: str  # an id of the hub, followed by ":CONFIGURATION" if it has several; or a folder
    split: str
    text_key: str
    saved: bool = False
    streaming: bool = False


class HubDataset:
    """A data set of the Hugging Face hub, read through the cache of the `datasets` library or streamed; or a saved data
    set.
    """

    def __init__(self, name: str, split: str, text_key: str, saved: bool = False, streaming: bool = False) -> None:
        self.name = name
        self.problems = Problems()
        self.kind = "saved data set" if saved else "hub"
        self._rows = Rows(name, split, text_key, saved, streaming)

    def describe(self) -> dict[str, Any]:
        rows = self._rows
        described = {"kind": self.kind, "split": rows.split, "text_key": rows.text_key}
        if rows.saved:
            status = [(path, os.stat(path)) for path, _ in self.contents()]
            state = state_of([(path, one.st_size, one.st_mtime_ns) for path, one in status])
            return {**described, "path": str(Path(self.name).resolve()), "state": state}
        return {**described, "id": self.name} | ({"streaming": True} if rows.streaming else {})

    def contents(self) -> list[tuple[str, int]]:
        files = sorted(path for path in Path(self.name).rglob("*") if path.is_file()) if self._rows.saved else []
        return [(str(path), path.stat().st_size) for path in files]

    def kind_of(self, path: str) -> str:
        return os.path.relpath(path, self.name)

    def units(self, source: int) -> Sequence[HubUnit | StreamUnit]:
        """Return ranges of rows; for a stream, its files. Raises DataError if there is no such text column."""
        data = _load(self._rows)
        _check_column(data, self._rows)
        if self._rows.streaming:
            # One unit per file on the hub. Its length is known only after reading.
            return [StreamUnit(source, 1, self._rows, part, data.num_shards) for part in range(data.num_shards)]
        bytes_per_row = data.data.nbytes / max(len(data), 1)
        units = []
        for first in range(0, len(data), _HUB_ROWS):
            last = min(first + _HUB_ROWS, len(data))
            units.append(HubUnit(source, int(bytes_per_row * (last - first)), self._rows, first, last))
        return units


@dataclass(frozen=True)
class HubUnit:
    """Rows [first, last) of a data set in the cache, or of a saved one."""

    source: int
    size: int
    rows: Rows
    first: int
    last: int

    def read(self, problems: Problems) -> Iterator[bytes]:
        data = _load(self.rows)
        name = column_of(data.column_names, self.rows.text_key)
        column = data.select_columns([name])
        for start in range(self.first, self.last, 1000):
            for value in column[start : min(start + 1000, self.last)][name]:
                yield clean(_text({name: value}, self.rows.text_key), problems)


@dataclass(frozen=True)
class StreamUnit:
    """One of the `parts` of a streamed data set; it is not stored."""

    source: int
    size: int
    rows: Rows
    part: int
    parts: int

    def read(self, problems: Problems) -> Iterator[bytes]:
        stream = iter(_load(self.rows).shard(num_shards=self.parts, index=self.part))
        while True:
            try:
                row = next(stream, None)
            except Exception as error:  # as in _load
                raise DataError(
                    f"the stream of {self.rows.name} broke off: {first_line(error)}; repeat the command"
                ) from error
            if row is None:
                return
            yield clean(_text(row, self.rows.text_key), problems)


def _text(row: dict[str, Any], key: str) -> str:
    try:
        return value_at(row, key) or ""
    except KeyError:  # a column within a null column
        return ""


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    isfile = os.path.isfile  # False if a folder is not accessible
    return isfile(path / _SPLITS_FILE) or all(isfile(path / name) for name in _DATASET_FILES)


def _check_column(data: Any, rows: Rows) -> None:
    names = data.column_names
    if names is None:  # the first row of a stream gives its columns
        names = list(next(itertools.chain(data.take(1), [{rows.text_key: ""}])))
    columns = ", ".join(names)
    name = column_of(names, rows.text_key)
    feature = data.features[name] if data.features and name in names else None
    for part in rows.text_key.removeprefix(name).split(".")[1:] if data.features else ():
        feature = feature.get(part) if isinstance(feature, Mapping) else None
    if name not in names or (data.features and feature is None):
        raise DataError(f"{rows.name} has no column {rows.text_key!r} (--text-key); its columns are: {columns}")
    kind = getattr(feature, "dtype", "a nested value") if data.features else "string"
    if kind not in ("string", "large_string"):
        raise DataError(f"the column {rows.text_key!r} of {rows.name} holds no text; its columns are: {columns}")


@functools.lru_cache(maxsize=1)
def _load(rows: Rows) -> Any:
    if not rows.saved and not _network():
        # Otherwise the library retries each address for half a minute. Cached data is still found.
        os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    try:
        if not rows.saved:
            name, _, configuration = rows.name.partition(":")
            return datasets.load_dataset(name, configuration or None, split=rows.split, streaming=rows.streaming)
        data = datasets.load_from_disk(rows.name)
    except Exception as error:  # the library has no common base for connection, HTTP, parsing and value errors
        if rows.saved:
            raise DataError(f"cannot read the saved data set {rows.name}: {first_line(error)}") from error
        raise DataError(
            f"input {rows.name!r} is neither a file or folder here nor a data set that could be loaded from the "
            f"Hugging Face hub (split {rows.split!r}): {first_line(error)}; check the name, the split and the network"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if rows.split not in data:
            raise DataError(f"{rows.name} has no split {rows.split!r} (--split); its splits are: {', '.join(data)}")
        return data[rows.split]
    return data


def _network() -> bool:
    """Return whether the hub's host name resolves, or a proxy is configured."""
    import urllib.parse
    import urllib.request

    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(urllib.request.getproxies() or socket.getaddrinfo(host, None))
    except OSError:
        return False
