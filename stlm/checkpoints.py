"""Model folders: their format, finding one in a run, and detecting damage.

A model folder holds config.json, model.safetensors (fp32, tied tensors once) and tokenizer/. The folder `model/` of a
checkpoint is one; `COMPLETE`, written last, records the checksums of the checkpoint's files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.storage.atomic import atomic_directory, sha256_file
from data_pipeline.tokenizers import Tokenizer, load_tokenizer
from stlm.artifact import read_artifact
from stlm.config import ModelConfig, from_dict, to_dict
from stlm.errors import CheckpointError

FORMAT = "stlm-model-1"


def save_model(
    directory: str | os.PathLike[str], config: ModelConfig, tokenizer: Tokenizer, tensors: Mapping[str, Tensor]
) -> None:
    """Write a model directory from parameters by name (fp32, on the CPU, tied ones under their first name only)."""
    with atomic_directory(directory) as temporary:
        description = json.dumps(describe_model(config, tokenizer), indent=2)
        (temporary / "config.json").write_text(description + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "model.safetensors")
        tokenizer.save(temporary / "tokenizer")


def describe_model(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of config.json of a model directory."""
    return {
        "format": FORMAT,
        "model": to_dict(config),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.spec,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def read_model(source: Path) -> tuple[ModelConfig, Tokenizer, dict[str, Tensor]]:
    """Read config, tokenizer and parameters (fp32, by name) of a model directory or an artifact.

    A model directory inside a checkpoint is verified against its recorded checksums. Raises CheckpointError.
    """
    if source.is_file():
        description, tokenizer, tensors = read_artifact(source)
        _check_description(description, source)
    else:
        if (source.parent / "COMPLETE").is_file() and (problem := damage_of(source.parent, "model/")):
            raise CheckpointError(f"{source.parent} is damaged: {problem}; use another checkpoint")
        description, tokenizer = _read_description(source), load_tokenizer(source / "tokenizer")
        tensors = _read_tensors(source / "model.safetensors")
    if tokenizer.fingerprint != description["tokenizer_fingerprint"]:
        raise CheckpointError(
            f"{source / 'tokenizer'}: its fingerprint is {tokenizer.fingerprint[:12]}, but the model was made "
            f"with {description['tokenizer_fingerprint'][:12]}; put back the tokenizer saved with the model"
        )
    return from_dict(ModelConfig, description["model"], source=str(source)), tokenizer, tensors


def read_model_config(directory: Path) -> ModelConfig:
    """Read the config of the model in a model directory."""
    return from_dict(ModelConfig, _read_description(directory)["model"], source=str(directory / "config.json"))


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); is {directory} a model directory?") from None
    _check_description(description, path)
    return description


def _check_description(description: Any, path: Path) -> None:
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f'{path}: expected "format": "{FORMAT}"; it was not written by stlm, or by a newer one')
    if missing := [key for key in ("model", "tokenizer_fingerprint") if key not in description]:
        raise CheckpointError(f"{path}: lacks {' and '.join(missing)}; it was changed, use another checkpoint")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); use another checkpoint") from None


# ---------------------------------------------------------------------- finding a model on disk


def locate_model(path: str | os.PathLike[str]) -> Path:
    """Return the model directory of a run, a checkpoint or a model directory; for an artifact, its own path.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if path.is_file() or (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        if not (path / "COMPLETE").is_file():
            raise CheckpointError(f"{path}: has no COMPLETE file, so it was never finished; use another checkpoint")
        return path / "model"
    checkpoint = newest_checkpoint(path)
    if checkpoint is not None:
        return checkpoint / "model"
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory; expected a run, a checkpoint or a model directory")
    raise CheckpointError(
        f"{path}: holds no complete checkpoint; expected a run directory (with checkpoints/step_…/COMPLETE), "
        "a checkpoint or a model directory"
    )


def run_directory(model: Path) -> Path:
    """Return where the run of a model directory is, if it has one: runs/NAME for runs/NAME/checkpoints/step_…/model."""
    return Path(os.path.normpath(model.resolve() / "../../.."))


def checkpoints_of(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Return a run's checkpoint folders, newest first, complete or not. Folders of other names, as of copies, do not
    count."""
    folder = Path(run_dir, "checkpoints")
    found = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in found if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """Return the complete checkpoint of the highest step, or None."""
    return next((path for path in checkpoints_of(run_dir) if (path / "COMPLETE").is_file()), None)


def damage_of(checkpoint: Path, part: str = "") -> str | None:
    """Verify a checkpoint's files; return a short description of the damage, or None if there is none.

    `part`: verify only files whose names begin with it, such as "model/".
    """
    try:
        complete = json.loads((checkpoint / "COMPLETE").read_text(encoding="utf-8"))
        files = dict(complete["files"])
    except FileNotFoundError:
        return "it has no COMPLETE file"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its COMPLETE file cannot be read ({error!r})"
    for name, recorded in files.items():
        file = checkpoint / name
        if not name.startswith(part):
            continue
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != recorded["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {recorded['bytes']:,}"
        if sha256_file(file) != recorded["sha256"]:
            return f"{name} has changed: its sha256 is not the recorded one"
    return None
