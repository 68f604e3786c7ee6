"""Progress of a run towards its end: steps, ids, bytes or time, whichever limit is closest to being reached.

The cost of the steps so far predicts which step is the last, so that one is logged, validated and saved as the last.
The schedule follows the same progress: after a tenth of the bytes, a tenth of it is done.
"""

from __future__ import annotations

from data_pipeline.plurals import number_of
from stlm.config import TrainingConfig


def used_up(training: TrainingConfig, step: int, ids: int, bytes: int, seconds: float) -> float:
    """Return the fraction of the run that is used up one step after `step`, if that step costs what others did.

    Above 1, that step would exceed a limit. `ids`, `bytes`, `seconds`: cost of the steps so far.
    """
    parts = [(step + 1) / training.max_steps]
    limits = training.limits
    for taken, limit in ((ids, limits.ids), (bytes, limits.bytes), (seconds, limits.wall_time_s)):
        if limit is not None and step > 0:
            parts.append(taken * (step + 1) / (step * limit))
    return max(parts)


def limits_of(training: TrainingConfig) -> dict[str, str]:
    """Return the limits that are set in addition to `max_steps`: name → words for people."""
    limits, words = training.limits, {}
    if limits.ids is not None:
        words["ids"] = number_of(limits.ids, "id")
    if limits.bytes is not None:
        words["bytes"] = number_of(limits.bytes, "byte")
    if limits.wall_time_s is not None:
        words["wall_time_s"] = f"{limits.wall_time_s:g} s of training"
    return words
