"""Provenance of a model, as far as its checkpoint and run record it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stlm.checkpoints import run_directory
from stlm.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """The provenance of a model; fields are None where the model lies outside of its checkpoint or run."""

    step: int | None = None
    data_fingerprint: str | None = None  # sha256 of its training data
    bits_per_byte: float | None = None  # of the validation text, where the step was validated
    command: str | None = None  # the last command that started the run, as it can be typed

    @classmethod
    def of(cls, model: Path) -> Origin:
        """Read the provenance of a model directory: runs/NAME/checkpoints/step_…/model.

        Raises CheckpointError where a file cannot be read.
        """
        run = run_directory(model)
        progress = _read_json(model.parent / "state.json", {})
        starts = _read_json(run / "environment.json", {}).get("starts") or [{}]
        try:
            return cls(
                progress.get("step"),
                progress.get("data_fingerprint"),
                progress.get("validation_bits_per_byte"),
                _launch_command(starts[-1].get("command")),
            )
        except (AttributeError, LookupError, OSError, ValueError) as error:
            raise CheckpointError(f"{model.parent}: its files cannot be read ({error!r})") from None


def _launch_command(command: str | None) -> str | None:
    """Return a recorded command with the launcher in front and without the arguments that the launcher adds."""
    if not command:
        return None
    words = [word for word in shlex.split(command) if not re.match(r"--local[_-]rank=", word)]
    return shlex.join(["deepspeed", *words] if words and words[0].endswith(".py") else words)


def _read_json(path: Path, missing: Any) -> Any:
    if not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from None
