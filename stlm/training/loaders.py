"""Loaders of a run, and their windows as batches of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from data_pipeline.loading.loaders import Data, train_loader, validation_loader
from data_pipeline.loading.prepared_data import TrainLoader, ValidationLoader
from data_pipeline.loading.windows import Windows
from stlm.config import RunConfig
from stlm.errors import ConfigError
from stlm.model import row_keys
from stlm.objectives import Batch


class Loaders(NamedTuple):
    """The two loaders of a run: the rows of its steps, and the windows of its validation text."""

    train: TrainLoader
    validation: ValidationLoader


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
    return Loaders(train, validation_loader(data, config.data, context))


def batch_of(windows: Windows, seed: int, step: int, first: int) -> Batch:
    """Return windows as a batch whose first row is row `first` of `step`; validation counts as step 0."""
    ids_BT = torch.from_numpy(windows.ids)
    documents_BT = None if windows.document_ids is None else torch.from_numpy(windows.document_ids)
    keys_B = row_keys(seed, step, range(first, first + len(ids_BT)))
    return Batch(ids_BT, ids_BT, torch.from_numpy(windows.loss_mask), keys_B, documents_BT)


def batch_sizes_of(progress: Mapping[str, Any], batch_size: int) -> list[list[int]]:
    """Return the `batch_sizes` of a run that resumes from `progress` with `batch_size`."""
    step, seen = progress.get("step", 0), progress.get("sequences_seen", 0)
    before = seen // step if step and seen and seen % step == 0 else batch_size  # of runs that recorded no list
    sizes = [list(each) for each in progress.get("batch_sizes") or [[0, before]]]
    if sizes[-1][1] != batch_size:
        sizes = [each for each in sizes if each[0] < step] + [[step, batch_size]]
    return sizes
