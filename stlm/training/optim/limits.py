"""Where a run ends, and how far it has come: by steps, ids, bytes or time, whichever is nearest to its end.

Which step will be the last is known beforehand from what the steps took so far, so that it is logged, validated and
saved as the last one, and the schedule is laid out over the whole: at a tenth of the bytes a tenth of it is done.
"""

from __future__ import annotations

from data_pipeline.plurals import number_of
from stlm.config import TrainingConfig


def used_up(training: TrainingConfig, step: int, ids: int, bytes: int, seconds: float) -> float:
    """The fraction of the run that will be used up when one more step is made after `step`, if it is like those before.

    Above 1 that step would be one too many. ids, bytes, seconds: what the steps made so far took.
    """
    parts = [(step + 1) / training.max_steps]
    limits = training.limits
    for taken, limit in ((ids, limits.ids), (bytes, limits.bytes), (seconds, limits.wall_time_s)):
        if limit is not None and step > 0:
            parts.append(taken * (step + 1) / (step * limit))
    return max(parts)


def limits_of(training: TrainingConfig) -> dict[str, str]:
    """The limits beside `max_steps` that are set, by their names, in words."""
    limits, words = training.limits, {}
    if limits.ids is not None:
        words["ids"] = number_of(limits.ids, "id")
    if limits.bytes is not None:
        words["bytes"] = number_of(limits.bytes, "byte")
    if limits.wall_time_s is not None:
        words["wall_time_s"] = f"{limits.wall_time_s:g} s of training"
    return words
