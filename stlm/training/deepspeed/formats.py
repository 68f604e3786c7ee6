"""Conversion of this project's checkpoints to DeepSpeed's formats, and of DeepSpeed's checkpoints to runs.

    deepspeed   native, as written by `engine.save_checkpoint`: sharded by rank, differently at each ZeRO stage, and
                loadable only on as many ranks at the same stage (1 and 2 count as one)
    universal   by parameter name, made by DeepSpeed's tool from a native one of stage 1 to 3: for any number of ranks,
                but not from stage 3 to the others or back

DeepSpeed itself writes both: an engine loads the checkpoint and saves it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loading.loaders import open_data
from data_pipeline.storage.atomic import (
    TEMPORARY_PREFIX,
    atomic_directory,
    follow_umask,
    fsync_tree,
    write_errors_as,
    write_text,
)
from data_pipeline.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from stlm.checkpoints import locate_model
from stlm.config import RunConfig, dump_run_config, load_run_config
from stlm.errors import CheckpointError, ConversionError
from stlm.stlm import STLM
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.internals import count_steps
from stlm.training.deepspeed.precision import Precision
from stlm.training.deepspeed.reader import read_deepspeed
from stlm.training.deepspeed.state_transfer import load_state
from stlm.training.distributed.connection import Distributed
from stlm.training.optim.averaging import AVERAGE
from stlm.training.optim.optimizers import build_optimizer
from stlm.training.optim.schedules import learning_rate_at
from stlm.training.run.checkpoint import check_checkpoint, read_progress, read_state
from stlm.training.run.run_directory import begin_run
from stlm.training.run.state import State


def write_deepspeed(
    form: str, source: str | os.PathLike[str], output: Path, deepspeed_config: Mapping[str, Any],
    distributed: Distributed, bf16: bool = False,
) -> str:  # fmt: skip
    """Write the checkpoint of `source` (a run: its newest) as "deepspeed" or "universal". Returns a line for people.

    The result is for as many ranks as call this together, and for the ZeRO stage of `deepspeed_config`. All tensors are
    fp32; `bf16` gives the files the names that an engine with a `bf16` block looks for. The run's config.yaml and
    tokenizer/ are added. An average of the weights is left out: DeepSpeed has none. `output` must be absent or empty.

    Raises CheckpointError where there is no sound checkpoint in a run, ConversionError where DeepSpeed has no such form
    or the result does not read back equal; then nothing is left behind.
    """
    path = locate_model(source).parent
    distributed.on_rank_zero(lambda: _refuse_unsound(path))
    config = load_run_config(path.parent.parent)
    state, progress = read_state(path), read_progress(path)
    state = state._replace(moments={key: named for key, named in state.moments.items() if key != AVERAGE})
    training = replace(config.training, ema_decay=None, micro_batch_size=None)
    model = STLM.load(path / "model")
    engine = Engine(
        model,
        build_optimizer(model, training),
        training,
        Precision("fp32", "as in the checkpoint"),
        deepspeed_config,
        distributed,
    )
    if form == "universal" and (engine.stage == 0 or training.optimizer != "adamw"):
        raise ConversionError(
            f"--to universal: got ZeRO stage {engine.stage} and training.optimizer = {training.optimizer}, expected "
            "stage 1, 2 or 3 and adamw, which DeepSpeed can make it from; --to deepspeed would work"
        )
    if bf16 and (engine.stage == 0 or form == "universal"):
        raise ConversionError(
            f"--bf16: got ZeRO stage {engine.stage} and --to {form}, expected stage 1, 2 or 3 and --to deepspeed; at "
            "stage 0 a bf16 block stores its weights differently, and universal checkpoints do not depend on it"
        )
    load_state(engine, state, [torch.zeros(1, config.model.context_length, dtype=torch.long, device=engine.device)])
    steps = progress["step"]
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate_at(max(steps, 1), training) * group.get("learning_rate_scale", 1.0)
    count_steps(engine.native, steps, training.batch_size)

    def begin() -> Path:
        output.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=output.parent))

    @write_errors_as(ConversionError)
    def finish() -> None:
        if form == "universal":
            _make_universal(folder, tag, inject=engine.stage < 3)
        for file in (folder / tag).glob("zero_pp_rank_*_optim_states.pt") if bf16 else ():
            file.rename(file.with_name(f"bf16_{file.name}"))
        write_text(folder / "config.yaml", dump_run_config(config))
        model.tokenizer.save(folder / "tokenizer")
        if not _equal(read_deepspeed(folder, model, training)[0], state):
            raise ConversionError(
                f"{path}: the checkpoint that DeepSpeed wrote differs from its source; nothing was written"
            )
        follow_umask(folder)
        fsync_tree(folder)
        os.replace(folder, output)

    folder = distributed.on_rank_zero(begin)
    tag = f"global_step{steps}"
    try:
        engine.native.save_checkpoint(str(folder), tag=tag, client_state={"stlm": progress})
        distributed.on_rank_zero(finish)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        engine.close()
    ranks = distributed.world_size
    told = f"for {ranks} rank{'s' * (ranks > 1)} at ZeRO stage {engine.stage}"
    if form == "universal":
        told = f"for any number of ranks at ZeRO stage {'3' if engine.stage == 3 else '1 or 2'}"
    return f"wrote {output}: step {steps}, {told}; weights and moments read back are the same"


def _refuse_unsound(checkpoint: Path) -> None:
    """Raise CheckpointError where the checkpoint is damaged, or its run's config is missing."""
    if problem := check_checkpoint(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged: {problem}; use another checkpoint")
    run = checkpoint.parent.parent
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run / 'config.yaml'} is missing, which holds the settings of {checkpoint.name}; expected a run, or a "
            "checkpoint in its run"
        )


def _make_universal(folder: Path, tag: str, inject: bool) -> None:
    """Replace the native checkpoint in a folder by a universal one."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / tag), "--output_folder", str(folder / f"{tag}_universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", *["--inject_missing_state"] * inject]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConversionError(f"DeepSpeed's ds_to_universal failed: {done.stderr.strip().splitlines()[-1]}")
    shutil.rmtree(folder / tag)
    (folder / "latest").unlink()


def _equal(one: State, other: State) -> bool:
    return one.updates == other.updates and all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in [
            (one.parameters, other.parameters),
            *((one.moments.get(key, {}), other.moments.get(key, {})) for key in {*one.moments, *other.moments}),
        ]
    )


@write_errors_as(ConversionError)
def import_deepspeed(folder: Path, output: Path, config: str | None = None) -> str:
    """Make a run from DeepSpeed's checkpoint, native or universal: weights, moments and steps.

    `config` (preset, file or run) describes the model and its further training; it may be left out for a checkpoint
    that `write_deepspeed` wrote. Raises ConversionError where it is needed but missing, or where `folder` is no
    checkpoint, incomplete, or of another model; then nothing is written.
    """
    if config is None and not ((folder / "config.yaml").is_file() and (folder / "tokenizer").is_dir()):
        raise ConversionError(
            f"{folder} has no config.yaml or no tokenizer/, so --to deepspeed has not written it; name the preset or "
            "file that describes its model with --config"
        )
    run = load_run_config(config or folder)
    tokenizer = load_tokenizer(folder / "tokenizer") if config is None else _tokenizer_of(run)
    model = STLM(run.model, tokenizer)
    state, steps, progress = read_deepspeed(folder, model, run.training)
    if run.training.ema_decay is not None:  # the average starts here
        trained = {name for named in state.moments.values() for name in named}  # Muon's matrices have other moments
        state.moments[AVERAGE] = {name: tensor for name, tensor in state.parameters.items() if name in trained}
    progress = {"step": steps, "sequences_seen": steps * run.training.batch_size, **progress}
    with atomic_directory(output) as temporary:
        begin_run(run, model, temporary, state, progress)
    return f"wrote {output}: {model.num_parameters():,} parameters with their moments, at step {steps}"


def _tokenizer_of(run: RunConfig) -> Tokenizer:
    named = run.data.dir is not None or run.data.mixture
    return open_data(run.data).tokenizer if named else build_tokenizer(run.data.tokenizer)
