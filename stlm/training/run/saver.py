"""Saving and restoring a run: its whole state is copied between two steps, and written during the next ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.prepared_data import TrainLoader
from stlm.config import RunConfig
from stlm.stlm import STLM
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.loss_scale import LossScale
from stlm.training.deepspeed.state_transfer import full_state, load_state
from stlm.training.run.async_writer import AsyncWriter
from stlm.training.run.checkpoint import (
    checkpoint_path,
    prune_checkpoints,
    read_progress,
    read_state,
    refuse_other_model,
    write_checkpoint,
)
from stlm.training.run.progress import RunProgress
from stlm.training.run.state import State


class Saver:
    """Checkpoints of one run. All ranks call `save`, `wait` and `restore`."""

    def __init__(self, config: RunConfig, model: STLM, engine: Engine, loader: TrainLoader, run_dir: Path) -> None:
        self._config = config
        self._model = model
        self._engine = engine
        self._loader = loader
        self.run_dir = run_dir
        self._copied: State | None = None  # the state in the newest checkpoint; the next one reuses its memory
        self.writer = AsyncWriter()  # works on rank 0
        self.step = 0  # of the newest checkpoint

    def save(
        self, progress: RunProgress, recovery: dict[str, Any], scheduled: bool, pending: Iterable[str] = ()
    ) -> RunProgress:  # fmt: skip
        """Save a checkpoint, unless there is one of this step. A scheduled one replaces one made by an interruption.

        `pending`: work to be done first when the run resumes. Returns the progress that the checkpoint holds.
        """
        if self.step == progress.step and (progress.scheduled or not scheduled) and not pending:
            return progress
        self.wait()  # before another copy of the state is made
        state = self._copied = full_state(self._engine, reused=self._copied)
        scale = self._engine.loss_scale
        progress = replace(
            progress,
            sequences_seen=self._loader.sequences(progress.step),
            batch_sizes=self._loader.batch_sizes,
            seed=self._config.seed,
            loss_scale=None if scale is None else scale._asdict(),
            recovery=recovery,
            data_fingerprint=self._loader.fingerprint,
            tokenizer_fingerprint=self._model.tokenizer.fingerprint,
            compiled=self._engine.compiled.on,
            scheduled=scheduled,
            pending=list(pending),
        )
        path, contents = checkpoint_path(self.run_dir, progress.step), progress.to_json(self._config.training)

        def write() -> None:
            write_checkpoint(path, self._config.model, self._model.tokenizer, state, contents)
            prune_checkpoints(self.run_dir, self._config.training)

        self._engine.distributed.on_rank_zero(lambda: self.writer.start(write))
        self.step = progress.step
        return progress

    def wait(self) -> None:
        """Wait until the newest checkpoint is on disk. Raises the error of writing it, on all ranks."""
        self._engine.distributed.on_rank_zero(self.writer.wait)

    def when_written(self, function: Callable[[], Path | None]) -> Path | None:
        """Return the value of `function` on rank 0, called once the newest checkpoint is on disk."""

        def after_writing() -> Path | None:
            self.writer.wait()
            return function()

        return self._engine.distributed.on_rank_zero(after_writing)

    def restore(self, path: Path, at_step: int | None = None) -> RunProgress:
        """Restore weights, moments and loss scale from a checkpoint of any number of ranks and any ZeRO stage.

        Returns its progress. Steps are counted on from `at_step`, by default from the checkpoint's. Raises
        CheckpointError if it holds another model.
        """
        refuse_other_model(path, self._config.model, self._model.tokenizer)
        example = torch.zeros(1, self._config.model.context_length, dtype=torch.long, device=self._engine.device)
        load_state(self._engine, read_state(path), [example])
        progress = RunProgress.of(read_progress(path))
        self._engine.count_steps(progress.step if at_step is None else at_step)
        if self._engine.loss_scale is not None:
            self._engine.loss_scale = LossScale(**progress.loss_scale or {})
        return progress
