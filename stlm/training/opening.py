"""Opening of a run: checks, run directory, logs, initial weights, and the record of each start."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.loading.prepared_data import TrainLoader
from stlm.checkpoints import newest_checkpoint
from stlm.config import ON_REQUEST, RunConfig, TrainingConfig
from stlm.config.yaml.build import to_dict
from stlm.stlm import STLM
from stlm.training.compilation import Choice, choose, refuse_uncompilable
from stlm.training.deepspeed.configuration import checked_deepspeed_config
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.precision import Precision, choose_precision
from stlm.training.distributed.agreement import fingerprints, refuse_differences
from stlm.training.distributed.connection import Distributed
from stlm.training.entropy import begin_entropy_patching
from stlm.training.init_from import begin_from, describe_freezing
from stlm.training.loaders import batch_sizes_of
from stlm.training.metrics.mfu import PASSES, count_flops
from stlm.training.metrics.monitor import Monitor
from stlm.training.metrics.summary import change_lines, opening_lines
from stlm.training.metrics.wandb_mirror import check_wandb
from stlm.training.run.checkpoint import read_progress
from stlm.training.run.progress import RunProgress
from stlm.training.run.run_directory import RunDirectory, Start

SHARE = 0.5  # of the peak that training is assumed to reach
SPLITS = {"tasks": "evals", "validation": "validation"}  # pending work → the split of its records

# Settings that may change on request (--allow-change): they affect the result.
REQUESTED = {
    f"training.{field.name}" for field in fields(TrainingConfig) if field.metadata.get("may_change") == ON_REQUEST
}


class OpenRun(NamedTuple):
    """An open run directory, and where its job begins."""

    directory: RunDirectory
    monitor: Monitor
    start: Start
    progress: RunProgress  # of the checkpoint at which it begins


def check_run(
    config: RunConfig, model: STLM, loader: TrainLoader, distributed: Distributed, deepspeed_config: Mapping[str, Any]
) -> Precision:
    """Refuse what cannot be trained, before anything is written. Returns the precision, the same on all ranks."""
    training = config.training
    refuse_differences(distributed, fingerprints(config, deepspeed_config, loader.fingerprint))
    if training.wandb:
        distributed.on_rank_zero(check_wandb)
    chosen = distributed.on_rank_zero(lambda: choose_precision(training.precision, deepspeed_config)._asdict())
    precision = Precision(**chosen)
    checked_deepspeed_config(model, training, precision, deepspeed_config, distributed)
    return precision


def open_run(
    config: RunConfig, model: STLM, loader: TrainLoader, distributed: Distributed, run_dir: Path, resume: str,
    allow_change: bool,
) -> OpenRun:  # fmt: skip
    """Open the run directory and its logs, set the initial weights of a new run, and print the first lines.

    Raises ConfigError or CheckpointError where the run cannot begin or resume as requested.
    """
    # Initial weights that do not fit are refused before the run directory is made.
    is_new = distributed.on_rank_zero(lambda: newest_checkpoint(run_dir) is None)
    notes = initialize(config, model, loader, distributed) if is_new and resume != "must" else []
    directory = RunDirectory(run_dir)
    known = config, loader.fingerprint, resume, allow_change
    start = Start(**distributed.on_rank_zero(lambda: directory.open(*known)._asdict()))
    distributed.on_every_rank(directory.check_shared)
    begun = read_progress(start.checkpoint) if start.checkpoint else {}
    progress, monitor = RunProgress.of(begun), Monitor(run_dir)
    wandb_config = to_dict(config) if config.training.wandb else None
    again = [SPLITS[name] for name in progress.pending if name in SPLITS]
    distributed.on_rank_zero(lambda: monitor.open(progress.step + 1, wandb_config, again))
    loader.batch_sizes = batch_sizes_of(begun, config.training.batch_size)
    for line in opening_lines(config, model, loader.description, run_dir, start, progress):
        monitor.say(line)
    if start.checkpoint is None and not is_new and resume != "must":  # all checkpoints are damaged
        notes = initialize(config, model, loader, distributed)
    for note in notes if start.checkpoint is None else ():
        monitor.say(note)
    if frozen := describe_freezing(model, config.training):
        monitor.say(frozen)
    return OpenRun(directory, monitor, start, progress)


def initialize(config: RunConfig, model: STLM, loader: TrainLoader, distributed: Distributed) -> list[str]:
    """Set the initial weights of a new run. Returns lines for the log."""
    taken_over = distributed.on_every_rank(lambda: begin_from(model, config.training))
    notes = begin_entropy_patching(model, loader, config.training.batch_size, distributed)
    return [*filter(None, [taken_over]), *notes]


def compile_or_not(opened: OpenRun, config: RunConfig, model: STLM, engine: Engine, peak: float) -> None:
    """Follow training.compile=auto: decide when a run begins, and later do as it did before.

    `peak`: FLOPs per second of one rank's device.
    """
    training, distributed = config.training, engine.distributed
    if training.compile != "auto":
        return
    if opened.start.checkpoint is not None:
        if opened.progress.compiled:
            cause = f"this run was compiled up to step {opened.progress.step}, and has to be for the same losses"
            distributed.on_every_rank(lambda: refuse_uncompilable(engine.stage, cause))
            engine.compiled.start(cause)
            opened.monitor.say("compiled, as before")
        return
    answer = distributed.on_rank_zero(
        lambda: choose(training_seconds(training, model, engine, peak), model, engine.stage)._asdict()
    )
    choice = Choice(**answer)
    if choice.compiles:
        engine.compiled.start()
    opened.monitor.say(f"{'compiled' if choice.compiles else 'not compiled'}: {choice.reason}")


def training_seconds(training: TrainingConfig, model: STLM, engine: Engine, peak: float) -> float:
    """Estimate the seconds of a whole run from its FLOPs, rather too low, as few models reach that share of the peak.

    Infinite under ZeRO stage 3, which has no whole weights to count FLOPs with, and is not compiled anyway.
    """
    if engine.stage == 3:
        return math.inf
    with torch.no_grad(), count_flops() as counter:
        model.eval()
        model.forward(torch.zeros(1, model.config.context_length, dtype=torch.long, device=engine.device))
    model.train()
    limits, ids = training.limits, training.batch_size * model.config.context_length
    steps = min(
        training.max_steps,
        (limits.ids or math.inf) / ids,
        (limits.bytes or math.inf) / (ids * float(model.tokenizer.bytes_per_id.mean())),
    )
    flops = PASSES * counter.get_total_flops() * engine.split.rows
    return min(steps * flops / (peak * SHARE), limits.wall_time_s or math.inf)


def record_start(opened: OpenRun, config: RunConfig, engine: Engine, progress: RunProgress) -> None:
    """Print and record the settings that changed since the job before, and record the environment of this one. Then
    limit the time that ranks wait for each other."""
    directory, monitor, start, _ = opened
    distributed, changed = engine.distributed, opened.start.changed
    before = None if directory.saved is None else directory.saved.training
    for line in change_lines(changed, config.training, before, progress) if start.checkpoint else ():
        monitor.say(line)
    requested = {key: values for key, values in changed.items() if key in REQUESTED}
    if requested and start.checkpoint:
        was, now = ({key: values[place] for key, values in requested.items()} for place in (0, 1))
        record = {"step": progress.step, "split": "changes", "was": was, "now": now}
        distributed.on_rank_zero(lambda: monitor.record(record))
    environment = {
        "ranks": distributed.world_size,
        "launcher": distributed.ranks.source,
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "precision": engine.precision._asdict(),
        "deepspeed_config": engine.config,
        **({"changed": changed} if changed else {}),
    }
    distributed.on_rank_zero(lambda: directory.record_start(progress.step, environment))
    run_dir = directory.path
    stacks = distributed.on_rank_zero(lambda: run_dir / "stacks" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    distributed.watch_for_hangs(stacks, config.training.hang_timeout_s)
