"""The progress of a run, read from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stlm.checkpoints import checkpoints_of, newest_checkpoint, step_of
from stlm.config import preset_names
from stlm.errors import CheckpointError
from stlm.training.run.checkpoint import read_progress


def run_state(source: Path) -> dict[str, Any]:
    """Return a run's progress; empty if the source is not a run. Raises CheckpointError where it has no checkpoint."""
    if str(source) in preset_names() or not source.is_dir():
        return {}
    newest = newest_checkpoint(source)
    if newest is None:
        raise CheckpointError(
            f"{source}: got a run without a complete checkpoint, expected checkpoints/step_…/COMPLETE; "
            f"describe its config instead: {source / 'config.yaml'}"
        )
    progress = read_progress(newest)
    text, _, _ = (source / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")  # drop an incomplete line
    records = [json.loads(line) for line in text.splitlines()]
    return {
        "run": {
            "step": progress["step"],
            "bytes_seen": progress["bytes_seen"],
            "checkpoints": [step_of(path) for path in reversed(checkpoints_of(source))],
            "last": {record["split"]: record for record in records},
        }
    }


def ranks_of(source: Path) -> int | None:
    """Return the number of ranks of a run's last start; None where it is not a run or not recorded."""
    path = source / "environment.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["starts"][-1]["ranks"]) if path.is_file() else None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def progress_of(source: Path) -> dict[str, Any]:
    """Return the state of a run's newest checkpoint; empty where there is none."""
    newest = newest_checkpoint(source)
    return {} if newest is None else read_progress(newest)
