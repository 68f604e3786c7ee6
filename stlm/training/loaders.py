"""The data as the trainer reads it: rows of a step and windows of the validation split, as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from data_pipeline.loading import Data, train_loader, validation_loader
from data_pipeline.reader import TrainLoader, ValidationLoader
from data_pipeline.windows import Windows
from stlm.config import RunConfig
from stlm.errors import ConfigError
from stlm.objectives import Batch


class TrainingBatches:
    """Batches of the training split. Steps are numbered from 1, as everywhere in training."""

    def __init__(self, loader: TrainLoader, fingerprint: str) -> None:
        self._loader = loader
        self.fingerprint = fingerprint  # of the data

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Rows [first, last) of a step: a pure function of the data, the seed, the step and the row."""
        return _tensors(self._loader.rows(step - 1, first, last))

    def epoch(self, step: int) -> float:
        """How many times the data has been read when `step` is done."""
        return self._loader.epoch(step)


class ValidationWindows:
    """All windows of the validation split, in the order of the text."""

    def __init__(self, loader: ValidationLoader) -> None:
        self._loader = loader
        self.num_windows = loader.num_windows
        self.source_names = loader.source_names

    def windows(self, first: int, last: int) -> Batch:
        """Windows [first, last)."""
        return _tensors(self._loader.windows(first, last))

    def source_ids(self, first: int, last: int) -> torch.Tensor:
        """Which source each id of windows [first, last) comes from: [n, T], indices of `source_names`."""
        return torch.from_numpy(self._loader.source_ids(first, last))


class Loaders(NamedTuple):
    """What a run reads: windows to train on, in their order, and windows to validate with."""

    train: TrainingBatches
    validation: ValidationWindows


def build_loaders(config: RunConfig, data: Data) -> Loaders:
    """Loaders of the two splits of a prepared folder or a mixture of several.

    ConfigError if the data was made with another tokenizer than the config names, DataError if a plan is missing.
    """
    tokenizer, context = data.tokenizer, config.model.context_length
    if tokenizer.spec != config.data.tokenizer:
        raise ConfigError(
            f"data.tokenizer: got {config.data.tokenizer!r}, but {data.dir} was prepared with {tokenizer.spec!r}; "
            f"set data.tokenizer={tokenizer.spec}, or name other data"
        )
    train = train_loader(data, config.data, context, config.training.batch_size, config.seed)
    validation = validation_loader(data, config.data, context)
    return Loaders(TrainingBatches(train, data.fingerprint), ValidationWindows(validation))


def _tensors(windows: Windows) -> Batch:
    documents = None if windows.document_ids is None else torch.from_numpy(windows.document_ids)
    return Batch(torch.from_numpy(windows.ids), torch.from_numpy(windows.loss_mask), documents)
