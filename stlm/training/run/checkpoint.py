"""Portable checkpoints: tensors by parameter name, in fp32, independent of the number of ranks and the ZeRO stage.

    checkpoints/step_00000500/
        model/                            config.json, model.safetensors, tokenizer/: all that using the model takes
        optimizer.safetensors             moments, keyed "exp_avg/NAME"; several files if large. Where the model is an
                                          average of weights, also the weights themselves, keyed "master/NAME"
        optimizer.safetensors.index.json  tensor → file
        state.json                        step, ids and bytes seen, fingerprints; whether the schedule asked for it
        COMPLETE                          written last: size and sha256 of every other file

A checkpoint is written to a temporary folder, flushed to disk and renamed, so it is either whole or absent.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.storage.atomic import TEMPORARY_PREFIX, atomic_directory, sha256_file
from data_pipeline.tokenizers import Tokenizer
from stlm.checkpoints import checkpoints_of, damage_of, read_model_config, save_model, step_of
from stlm.config import ModelConfig, TrainingConfig, changed_keys, value_at
from stlm.errors import CheckpointError
from stlm.training.optim.averaging import AVERAGE
from stlm.training.run.state import State

FORMAT = "stlm-checkpoint-1"
PART_BYTES = 2 << 30  # largest size of an optimizer file
MASTER = "master"  # the trained weights, where the model is their average
INDEX = "optimizer.safetensors.index.json"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of a step's checkpoint: run_dir/checkpoints/step_00000500."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def write_checkpoint(
    path: Path, config: ModelConfig, tokenizer: Tokenizer, state: State, progress: Mapping[str, Any],
    part_bytes: int = PART_BYTES,
) -> None:  # fmt: skip
    """Write a checkpoint to `path`. `progress` goes into state.json.

    Raises CheckpointError where it cannot be written, and leaves nothing behind.
    """
    model, kept = state.parameters, state.moments
    if AVERAGE in kept:
        average = kept[AVERAGE]
        masters = {name: state.parameters[name] for name in average}
        model, kept = state.parameters | average, {key: kept[key] for key in kept if key != AVERAGE} | {MASTER: masters}
    tensors = {f"{key}/{name}": tensor for key, named in kept.items() for name, tensor in named.items()}
    need = sum(tensor.nbytes for tensor in [*model.values(), *tensors.values()]) + (1 << 20)
    parts = list(_parts(tensors, part_bytes))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if need > shutil.disk_usage(path.parent).free:
            raise CheckpointError(_no_space(path, need))
        with atomic_directory(path) as folder:
            save_model(folder / "model", config, tokenizer, model)
            index: dict[str, str] = {}
            for number, part in enumerate(parts, start=1):
                suffix = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
                name = f"optimizer{suffix}.safetensors"
                save_file({key: tensor.contiguous() for key, tensor in part.items()}, folder / name)
                index |= dict.fromkeys(part, name)
            _write_json(folder / INDEX, {"weight_map": index})
            _write_json(folder / "state.json", {"format": FORMAT, **progress, "updates": state.updates})
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            sums = {
                file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for file in files
            }
            _write_json(folder / "COMPLETE", {"format": FORMAT, "files": sums})
    except (OSError, SafetensorError) as error:
        if _is_full(error, path, need):
            raise CheckpointError(_no_space(path, need)) from error
        raise CheckpointError(f"cannot save {path}: {error}") from error


def check_checkpoint(path: Path) -> str | None:
    """Describe the damage of a checkpoint in a few words; None if every byte is as it was written."""
    if problem := damage_of(path):
        return problem
    written = json.loads((path / "COMPLETE").read_text(encoding="utf-8")).get("format")
    return None if written == FORMAT else f"its format is {written!r}, expected {FORMAT!r}"


def refuse_other_model(path: Path, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
    """Raise CheckpointError where a checkpoint holds a model of another config, or of another tokenizer if given."""
    saved = read_model_config(path / "model")
    if changed := [f"model.{key} ({value_at(saved, key)!r} there)" for key in changed_keys(saved, config)]:
        raise CheckpointError(
            f"{path} holds a model with different settings: {', '.join(changed)}; "
            "resume it with its own config, or choose another folder with --run"
        )
    if tokenizer is not None and read_progress(path)["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise CheckpointError(
            f"{path}: the model has another tokenizer than the data, which has {tokenizer.spec}; use data prepared "
            f"with {path / 'model' / 'tokenizer'}, or choose another folder with --run"
        )


def read_progress(path: Path) -> dict[str, Any]:
    """Read state.json."""
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def read_state(path: Path) -> State:
    """Read parameters and moments of a checkpoint that was checked."""
    weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    moments: dict[str, dict[str, Tensor]] = {}
    for file in sorted(set(weight_map.values())):
        for key, tensor in load_file(path / file).items():
            moment, _, name = key.partition("/")
            moments.setdefault(moment, {})[name] = tensor
    model = load_file(path / "model" / "model.safetensors")
    if masters := moments.pop(MASTER, None):
        moments[AVERAGE] = {name: model[name] for name in masters}
        model |= masters
    return State(model, moments, read_progress(path)["updates"])


def prune_checkpoints(run_dir: Path, training: TrainingConfig) -> None:
    """Delete checkpoints that are no longer needed, and temporary folders left by killed processes.

    Of the scheduled checkpoints it keeps the newest `keep_last`, those of every `keep_every_steps`-th step, and with
    `keep_best` the one with the lowest validation bits per byte, exactly as in an uninterrupted run. Of the checkpoints
    made by interruptions it keeps the newest `keep_last`, until a scheduled one is newer.
    """
    found = checkpoints_of(run_dir)
    scheduled = [path for path in found if is_scheduled(path)]
    newer = found[: found.index(scheduled[0])] if scheduled else found
    kept = {*scheduled[: training.keep_last], *newer[: training.keep_last]}
    if training.keep_every_steps is not None:
        kept |= {path for path in scheduled if step_of(path) % training.keep_every_steps == 0}
    if training.keep_best and (best := best_checkpoint(run_dir)) is not None:
        kept.add(best)
    for path in found:
        if path in kept:
            continue
        doomed = tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        os.replace(path, doomed)  # atomic: a half-deleted checkpoint is never seen under its name
    for path in (run_dir / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def is_scheduled(path: Path) -> bool:
    """Return True if an uninterrupted run saves this checkpoint too; False for one made by an interruption."""
    try:
        return bool(read_progress(path).get("scheduled", True))
    except (OSError, ValueError, AttributeError):  # damaged: reading the checkpoint reports it
        return True


def best_checkpoint(run_dir: Path) -> Path | None:
    """Return the complete scheduled checkpoint with the lowest validation bits per byte, the newest of equals; None if
    none was validated."""
    scored = []
    for path in checkpoints_of(run_dir):
        if (path / "COMPLETE").is_file() and is_scheduled(path):
            score = read_progress(path).get("validation_bits_per_byte")
            if score is not None:
                scored.append((score, -step_of(path), path))
    return min(scored)[2] if scored else None


def _parts(tensors: Mapping[str, Tensor], part_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield parts of consecutive tensors, each as large as fits."""
    part: dict[str, Tensor] = {}
    size = 0
    for key, tensor in tensors.items():
        if part and size + tensor.nbytes > part_bytes:
            yield part
            part, size = {}, 0
        part[key] = tensor
        size += tensor.nbytes
    yield part


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def _is_full(error: OSError | SafetensorError, path: Path, need: int) -> bool:
    """Return whether a checkpoint was not written for want of space. safetensors does not pass on the error's number,
    but what it wrote is deleted by now, so that the free space tells.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return need > shutil.disk_usage(path.parent).free


def _no_space(path: Path, need: int) -> str:
    free = shutil.disk_usage(path.parent).free
    return (
        f"cannot save {path}: the checkpoint needs {need / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free on "
        "that disk; free some space and rerun the command: it resumes from the previous checkpoint, which is unchanged"
    )
