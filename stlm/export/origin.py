"""Where a model comes from, as far as its checkpoint and its run say so."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stlm.errors import CheckpointError


@dataclass(frozen=True)
class Origin:
    """What is known of a model besides itself; None where it was taken out of its checkpoint or run."""

    step: int | None = None
    data_fingerprint: str | None = None  # sha256 of what it was trained on
    bits_per_byte: float | None = None  # of the validation text, where the step was validated
    command: str | None = None  # that started the run, the last time, as it can be typed

    @classmethod
    def of(cls, model: Path) -> Origin:
        """That of a model directory: runs/NAME/checkpoints/step_…/model. Raises CheckpointError."""
        run = Path(os.path.normpath(model.resolve() / "../../.."))
        progress = _read(model.parent / "state.json", {})
        starts = _read(run / "environment.json", {}).get("starts") or [{}]
        try:
            return cls(
                progress.get("step"),
                progress.get("data_fingerprint"),
                progress.get("validation_bits_per_byte"),
                _typed(starts[-1].get("command")),
            )
        except (AttributeError, LookupError, OSError, ValueError) as error:
            raise CheckpointError(f"{model.parent}: its files cannot be read ({error!r})") from None


def _typed(command: str | None) -> str | None:
    """A recorded command, which is what the script was given, with the launcher and without what that has added."""
    if not command:
        return None
    words = [word for word in shlex.split(command) if not re.match(r"--local[_-]rank=", word)]
    return shlex.join(["deepspeed", *words] if words and words[0].endswith(".py") else words)


def _read(path: Path, missing: Any) -> Any:
    if not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use another checkpoint") from None
