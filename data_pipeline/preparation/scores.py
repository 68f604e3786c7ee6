"""Scores of the training documents, by which a curriculum may order them: DIR/train/scores.npy, one float32 each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.storage.atomic import atomic_file
from data_pipeline.storage.documents import TRAIN, Gathered

_FILE = Path("train", "scores.npy")


def write_scores(gathered: Sequence[Gathered], output: Path, key: str) -> None:
    """Write the scores of the documents chosen for training, in their order. Raises DataError if one has none."""
    total = sum(int((unit.choice == TRAIN).sum()) for unit in gathered)
    with atomic_file(output / _FILE) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        for unit in gathered:
            scores = unit.scores[unit.choice == TRAIN]
            if np.isnan(scores).any():
                raise DataError(
                    f"--score-key {key} asks for a score of every document, but only JSON Lines can hold one; leave "
                    "it out, or prepare the other inputs separately"
                )
            file.write(scores.astype("<f4").tobytes())


def open_scores(directory: Path, documents: int) -> NDArray[np.float32]:
    """Return the scores of prepared data, mapped into memory. Raises DataError if it has none."""
    path = directory / _FILE
    if not path.is_file():
        raise DataError(f"{directory} has no scores: prepare it from JSON Lines with --score-key KEY")
    scores: NDArray[np.float32] = np.load(path, mmap_mode="r")
    if len(scores) != documents:
        found, expected = number_of(len(scores), "score"), number_of(documents, "document")
        raise DataError(f"{path} has {found} for {expected}; prepare the data again")
    return scores
