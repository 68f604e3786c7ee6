"""The loaders of a run, from its configuration: folders, windows and their order."""

from __future__ import annotations

from data_pipeline.config import DataConfig
from data_pipeline.loading.mixture import Interleaved, Mixture
from data_pipeline.loading.order import EasyToHard, Order, Shuffled, derived_seed
from data_pipeline.loading.prepared_data import PreparedData, TrainLoader, ValidationLoader
from data_pipeline.loading.window_plans import Plan
from data_pipeline.loading.windows import JoinedWindows, PlannedWindows, StreamWindows, WindowSet
from data_pipeline.plurals import number_of
from data_pipeline.preparation.pipeline import ensure_default_data

Data = PreparedData | Mixture


def open_data(config: DataConfig) -> Data:
    """Open the configured data: a mixture, a folder, or the default corpus, which is prepared if it is missing.

    Checks the size of every file; if `config.verify` is set, or None and the data is small, also its sha256. Raises
    DataError if the data is missing or damaged.
    """
    if config.mixture:
        parts = [PreparedData.open(part.dir, config.verify) for part in config.mixture]
        return Mixture(parts, [part.weight for part in config.mixture])
    return PreparedData.open(config.dir or ensure_default_data(config.tokenizer), config.verify)


def train_loader(data: Data, config: DataConfig, context_length: int, batch_size: int, seed: int) -> TrainLoader:
    """Return the training windows of `data`, packed and ordered as configured.

    batch_size: rows per step over all ranks. Raises DataError if a plan is missing.
    """
    parts = data.parts if isinstance(data, Mixture) else [data]
    sets: list[WindowSet] = []
    orders: list[Order] = []
    for number, part in enumerate(parts):
        windows, order = _windows_of(part, config, context_length, derived_seed(seed, number))
        sets.append(windows)
        orders.append(order)
    windows, order = sets[0], orders[0]
    if isinstance(data, Mixture):
        order = Interleaved(orders, [windows.num_windows for windows in sets], data.weights)
        windows = JoinedWindows(sets)
    return TrainLoader(windows, order, batch_size, data.fingerprint, describe_data(data))


def validation_loader(data: Data, config: DataConfig, context_length: int) -> ValidationLoader:
    """Return every id of the validation text once, in order. Documents are kept apart if training keeps them apart."""
    tokenizer = data.tokenizer
    end = None if config.packing == "stream" else tokenizer.end_of_text_id
    return ValidationLoader(data.split("validation"), context_length, tokenizer.pad_id, end, data.sources("validation"))


def describe_data(data: Data) -> str:
    """Describe the data in one line: folder, size, tokenizer and fingerprint."""
    parts = data.parts if isinstance(data, Mixture) else [data]
    ids, held_back = (sum(part.manifest.total(split, "ids") for part in parts) for split in ("train", "validation"))
    folders = " + ".join(str(part.dir) for part in parts)
    return (
        f"{folders}: {number_of(ids, 'id')} to train on, {held_back:,} to validate with, "
        f"tokenizer {data.tokenizer.spec}, fingerprint {data.fingerprint[:12]}"
    )


def _windows_of(data: PreparedData, config: DataConfig, context_length: int, seed: int) -> tuple[WindowSet, Order]:
    tokenizer, stream = data.tokenizer, data.split("train")
    plan = None
    if config.curriculum is not None or config.packing in ("padded", "best_fit"):
        plan = Plan.open(data, config.packing, context_length, config.curriculum, config.verify)
    windows: WindowSet
    if plan is not None and plan.pieces is not None and plan.firsts is not None:
        windows = PlannedWindows(
            stream, plan.pieces, plan.firsts, context_length, config.packing == "best_fit", tokenizer
        )
    else:
        end = tokenizer.end_of_text_id if config.packing == "documents" else None
        windows = StreamWindows(stream, context_length, tokenizer.pad_id, end)
    if plan is not None and plan.ranking is not None:
        return windows, EasyToHard(plan.ranking, plan.edges, seed)
    return windows, Shuffled(windows.num_windows, seed)
