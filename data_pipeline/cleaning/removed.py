"""The list of all documents that cleaning removed, in full, with the source and the rule of each.

Documents removed by a step on single documents are recorded in the work folder when the unit is read; those removed by
comparison are still among the gathered ones. The list combines both after the selection.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.sources.conversations import END_OF_STORED_SEGMENT
from data_pipeline.storage.atomic import atomic_file
from data_pipeline.storage.documents import REMOVED, Gathered

_SEGMENT = bytes([END_OF_STORED_SEGMENT])  # between the parts of a conversation


@dataclass(frozen=True)
class Stage:
    """The documents that one rule removed, as a mask over all units, and details of each."""

    rule: str
    gone: NDArray[np.bool_]
    details: Callable[[int], dict[str, Any]] = lambda number: {}


def write_removed(path: Path, units: Sequence[Gathered], names: Sequence[str], stages: Sequence[Stage]) -> None:
    """Write a line of JSON for each removed document: source, rule, details and text. names: of each unit's source."""
    start = 0
    with atomic_file(path) as file:
        for unit, name in zip(units, names, strict=True):
            with unit.file(REMOVED).open("rb") as noted:
                for line in noted:
                    file.write(orjson.dumps({"source": name, **orjson.loads(line)}) + b"\n")
            stop = start + len(unit.index)
            for stage in stages:
                places = np.flatnonzero(stage.gone[start:stop]).tolist()
                for place, document in zip(places, unit.pick(places), strict=True):
                    entry = {"source": name, "rule": stage.rule, **stage.details(start + place)}
                    text = document.replace(_SEGMENT, b"\n").decode("utf-8")
                    file.write(orjson.dumps(entry | {"text": text}) + b"\n")
            start = stop


def check_list(name: str, inputs: Sequence[str]) -> None:
    """Raise DataError if no such list can be written here, or if it would overwrite something or become input."""
    path = Path(name)
    if path.suffix != ".jsonl":
        raise DataError(f"the list of removed documents is JSON Lines: expected a name in .jsonl, got {name!r}")
    for source in inputs:
        if Path(source).is_dir() and path.resolve().is_relative_to(Path(source).resolve()):
            raise DataError(f"{name} lies in the input {source}, where it would be read as text; name another place")
    if path.exists() and not _is_list(path):
        raise DataError(f"{name} exists and is not a list of removed documents; name another file")
    parent = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DataError(f"cannot write {name}: {parent} is not a folder that may be written to")


def _is_list(path: Path) -> bool:
    """Return whether a file was written by `write_removed`."""
    try:
        with path.open("rb") as file:
            line = file.readline()
        return not line or list(json.loads(line))[:2] == ["source", "rule"]
    except (OSError, ValueError, TypeError):
        return False
