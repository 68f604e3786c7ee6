"""Data as tensors: the rows of a training step, and the windows of the validation split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from data_pipeline.loading.loaders import Data, train_loader, validation_loader
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.prepared_data import TrainLoader, ValidationLoader
from data_pipeline.loading.windows import Windows
from data_pipeline.plurals import number_of
from stlm.config import RunConfig
from stlm.errors import ConfigError
from stlm.model import row_keys
from stlm.objectives import Batch


class TrainingBatches:
    """Batches of the training split. Steps are numbered from 1, as everywhere in training.

    A step reads the windows after those of the step before it, so a change of the batch size repeats or skips none in
    an epoch. `batch_sizes` lists pairs of a step and the size after it: [[0, 32], [500, 64]] is 32 up to step 500 and
    64 after it.
    """

    def __init__(self, loader: TrainLoader, seed: int, fingerprint: str, description: str = "") -> None:
        self._loader = loader
        self._seed = seed
        self.fingerprint = fingerprint  # of the data
        self.description = description  # of the data, for people
        self.batch_sizes = [[0, loader.batch_size]]

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Return rows [first, last) of a step: a pure function of data, seed, batch sizes, step and row."""
        if not 0 <= first <= last <= self.batch_size(step):
            raise IndexError(f"rows {first} to {last} of a batch of {self.batch_size(step)}")
        start = self.sequences(step - 1)
        return _batch(self._loader.span(start + first, start + last), row_keys(self._seed, step, range(first, last)))

    def batch_size(self, step: int) -> int:
        """Return the number of rows of a step."""
        return next(size for first, size in reversed(self.batch_sizes) if first < step or first == 0)

    def sequences(self, step: int) -> int:
        """Return the number of rows in the first `step` steps together."""
        ends = [first for first, _ in self.batch_sizes[1:]] + [step]
        return sum(
            size * max(0, min(end, step) - first) for (first, size), end in zip(self.batch_sizes, ends, strict=True)
        )

    def epoch(self, step: int) -> float:
        """Return the passes over the data after `step`, as a fraction."""
        return self.sequences(step) / self._loader.num_windows


class ValidationWindows:
    """All windows of the validation split, in the order of the text."""

    def __init__(self, loader: ValidationLoader, seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self.num_windows = loader.num_windows
        self.source_names = loader.source_names

    def windows(self, first: int, last: int) -> Batch:
        """Return windows [first, last), as rows of a step 0: the same at every validation."""
        return _batch(self._loader.windows(first, last), row_keys(self._seed, 0, range(first, last)))

    def source_ids(self, first: int, last: int) -> torch.Tensor:
        """Return the source of each id in windows [first, last): [n, T], indices of `source_names`."""
        return torch.from_numpy(self._loader.source_ids(first, last))


class Loaders(NamedTuple):
    """The two loaders of a run: training windows in their order, and validation windows."""

    train: TrainingBatches
    validation: ValidationWindows


def build_loaders(config: RunConfig, data: Data) -> Loaders:
    """Build the loaders of both splits, for a prepared folder or a mixture of several.

    Raises ConfigError if the data was made with another tokenizer than the config names, DataError if a plan is
    missing.
    """
    tokenizer, context = data.tokenizer, config.model.context_length
    if tokenizer.spec != config.data.tokenizer:
        raise ConfigError(
            f"data.tokenizer: got {config.data.tokenizer!r}, but {data.dir} was prepared with {tokenizer.spec!r}; "
            f"set data.tokenizer={tokenizer.spec}, or name other data"
        )
    train = train_loader(data, config.data, context, config.training.batch_size, config.seed)
    validation = validation_loader(data, config.data, context)
    batches = TrainingBatches(train, config.seed, data.fingerprint, describe_data(data))
    return Loaders(batches, ValidationWindows(validation, config.seed))


def batch_sizes_of(progress: Mapping[str, Any], batch_size: int) -> list[list[int]]:
    """Return the `batch_sizes` of a run that resumes from `progress` with `batch_size`."""
    step, seen = progress.get("step", 0), progress.get("sequences_seen", 0)
    before = seen // step if step and seen and seen % step == 0 else batch_size  # of runs that recorded no list
    sizes = [list(each) for each in progress.get("batch_sizes") or [[0, before]]]
    if sizes[-1][1] != batch_size:
        sizes = [each for each in sizes if each[0] < step] + [[step, batch_size]]
    return sizes


def describe_data(data: Data) -> str:
    """Describe the data in one line: folder, size, tokenizer and fingerprint."""
    parts = data.parts if isinstance(data, Mixture) else [data]
    ids, held_back = (sum(part.manifest.total(split, "ids") for part in parts) for split in ("train", "validation"))
    folders = " + ".join(str(part.dir) for part in parts)
    return (
        f"{folders}: {number_of(ids, 'id')} to train on, {held_back:,} to validate with, "
        f"tokenizer {data.tokenizer.spec}, fingerprint {data.fingerprint[:12]}"
    )


def _batch(windows: Windows, row_keys_B: torch.Tensor) -> Batch:
    ids_BT = torch.from_numpy(windows.ids)
    documents_BT = None if windows.document_ids is None else torch.from_numpy(windows.document_ids)
    return Batch(ids_BT, ids_BT, torch.from_numpy(windows.loss_mask), row_keys_B, documents_BT)
