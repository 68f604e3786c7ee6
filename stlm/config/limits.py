"""Limits of a run: ids, bytes and time."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.yaml.fields import setting


@dataclass(frozen=True)
class LimitsConfig:
    """Limits in addition to training.max_steps. The first one reached ends the run, and the schedule follows it."""

    ids: int | None = setting(None, "ids predicted in training; null: no limit", minimum=1, may_change=True)
    bytes: int | None = setting(None, "bytes of text trained on; null: no limit", minimum=1, may_change=True)
    wall_time_s: float | None = setting(
        None,
        "seconds of training, over all starts, at which the last step ends (its validation and checkpoint follow); the "
        "learning rates then depend on the machine's speed; null: no limit",
        above=0.0,
        may_change=True,
    )
