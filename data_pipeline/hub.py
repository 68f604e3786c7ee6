"""Data sets of the Hugging Face hub, by the `datasets` library, which is imported when one is asked for."""

from __future__ import annotations

import functools
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.textfiles import Problems, clean

_HUB_ROWS = 1 << 16  # in one unit


class HubDataset:
    """A data set of the Hugging Face hub, through the `datasets` library and its cache."""

    kind = "hub"

    def __init__(self, name: str, split: str, text_key: str) -> None:
        self.name = name
        self.problems = Problems()
        self._split = split
        self._text_key = text_key

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "id": self.name, "split": self._split, "text_key": self._text_key}

    def units(self, source: int) -> list[HubUnit]:
        data = _load_from_hub(self.name, self._split)
        columns = ", ".join(data.column_names)
        if self._text_key not in data.column_names:
            raise DataError(f"{self.name} has no column {self._text_key!r} (--text-key); its columns are: {columns}")
        if data.features[self._text_key].dtype not in ("string", "large_string"):
            raise DataError(f"the column {self._text_key!r} of {self.name} holds no text; its columns are: {columns}")
        bytes_per_row = data.data.nbytes / max(len(data), 1)
        units = []
        for first in range(0, len(data), _HUB_ROWS):
            last = min(first + _HUB_ROWS, len(data))
            size = int(bytes_per_row * (last - first))
            units.append(HubUnit(source, size, self.name, self._split, self._text_key, first, last))
        return units


@dataclass(frozen=True)
class HubUnit:
    """Rows [first, last) of a hub data set."""

    source: int
    size: int
    name: str
    split: str
    text_key: str
    first: int
    last: int

    def read(self, problems: Problems) -> Iterator[bytes]:
        column = _load_from_hub(self.name, self.split).select_columns([self.text_key])
        for start in range(self.first, self.last, 1000):
            for text in column[start : min(start + 1000, self.last)][self.text_key]:
                yield clean(text or "", problems)


@functools.lru_cache(maxsize=1)
def _load_from_hub(name: str, split: str) -> Any:
    if not _network():
        # Otherwise the library tries each address for half a minute. What is in its cache is found all the same.
        os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library has no common base for connection, HTTP, parsing and value errors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"input {name!r} is neither a file or folder here nor a data set that could be loaded from the Hugging "
            f"Face hub (split {split!r}): {lines[0]}; check the name, the split and the network"
        ) from error


def _network() -> bool:
    """Whether the hub's name can be looked up, or a proxy will do so."""
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(urllib.request.getproxies() or socket.getaddrinfo(host, None))
    except OSError:
        return False
