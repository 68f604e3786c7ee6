"""Parameters, FLOPs and memory of a model, with the tokenizer of its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import default_data_dir
from data_pipeline.tokenizers import build_tokenizer, load_tokenizer, parse_spec
from stlm.checkpoints import newest_checkpoint
from stlm.config import RunConfig
from stlm.model import account, optimizer_bytes, recompute_layers
from stlm.stlm import STLM
from stlm.training.distributed.ranks import BatchSplit

BYTES_PER_ID = 4  # assumed for an untrained subword vocabulary; one of 4,096 reaches it (docs/data.md)


def costs(config: RunConfig, source: Path, ranks: int, bytes_per_id: float | None = None) -> dict[str, Any]:
    """Return the facts that follow from the config, and from the tokenizer of `source` where that is a run.

    `bytes_per_id`: mean bytes of an id, for costs per byte; None: those of the data, or 4 where there is none.
    """
    tokenizer, mean = tokenizer_of(config, source)
    bytes_per_id = bytes_per_id or mean or float(BYTES_PER_ID)
    rows = BatchSplit.of(config.training, ranks).micro_batch_size

    def make() -> STLM:
        model = STLM(config.model, tokenizer)
        if config.training.activation_checkpointing:
            recompute_layers(model)
        return model

    measure = account(make, tokenizer.vocab_size, config.model.context_length, rows)
    states = {stage: optimizer_bytes(measure, stage, ranks) for stage in range(4)}
    kinds = [config.model.embedder.kind, config.model.core.kind, config.model.head.kind]
    return {
        "kinds": kinds,
        "width": config.model.width,
        "context_length": config.model.context_length,
        "tokenizer": config.data.tokenizer,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_id": bytes_per_id,
        "bytes_per_id_assumed": not mean,
        "ranks": ranks,
        "batch_size": config.training.batch_size,
        "max_steps": config.training.max_steps,
        **dataclasses.asdict(measure),
        "forward_flops_per_byte": measure.forward_flops / bytes_per_id,
        "backward_flops_per_byte": measure.backward_flops / bytes_per_id,
        "cache_bytes_per_byte": measure.cache_bytes / config.model.context_length / bytes_per_id,
        "training_bytes": states,
    }


class AssumedTokenizer:
    """A placeholder for the tokenizer of data that is not prepared yet: every id is four bytes."""

    start_id = 1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.bytes_per_id = np.full(vocab_size, BYTES_PER_ID, dtype=np.int32)

    def decode_bytes(self, ids: Any) -> bytes:
        return b"".join(id.to_bytes(BYTES_PER_ID, "big") for id in ids)


def tokenizer_of(config: RunConfig, source: Path) -> tuple[Any, float | None]:
    """Return the tokenizer of the run or prepared data, or a placeholder, and mean bytes per id if known."""
    kind, vocab_size = parse_spec(config.data.tokenizer)
    if kind == "byte":
        return build_tokenizer("byte"), 1.0
    folders = [Path(part.dir) for part in config.data.mixture]
    folders = folders or [Path(config.data.dir or default_data_dir(config.data.tokenizer))]
    prepared = [PreparedData.open(folder) for folder in folders if folder.is_dir()]
    fitting = [data for data in prepared if data.tokenizer.spec == config.data.tokenizer]
    total = {unit: sum(data.manifest.total("train", unit) for data in fitting) for unit in ("bytes", "ids")}
    mean = total["bytes"] / total["ids"] if total["ids"] else None
    checkpoint = newest_checkpoint(source)
    if checkpoint is not None:
        return load_tokenizer(checkpoint / "model" / "tokenizer"), mean
    if fitting:
        return fitting[0].tokenizer, mean
    return (build_tokenizer(config.data.tokenizer) if kind == "hf" else AssumedTokenizer(vocab_size)), mean
