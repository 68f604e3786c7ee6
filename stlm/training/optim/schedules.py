"""Learning rates as pure functions of the step: nothing to save, nothing to restore.

Steps are numbered from 1: step s is the s-th update, and max_steps the last. So the first update of a warm-up is small
but not zero, step `warmup_steps` has exactly `learning_rate`, and step `max_steps` exactly
`final_learning_rate_fraction` of it (cosine and wsd). A run of fewer steps than its warm-up ends within it, so a short
trial of a recipe makes the same first steps as the whole run.
"""

from __future__ import annotations

import math

from stlm.config import TrainingConfig


def learning_rate_at(step: int, training: TrainingConfig, used_up: float = 0.0) -> float:
    """Return the learning rate of update `step`, 1 … max_steps.

    `used_up` is the fraction of the run that ends with this step. Where a limit makes it more than step / max_steps,
    the schedule follows it; warm-up always counts steps.

    Linear warm-up over `warmup_steps`, then
    - cosine: half a cosine down to the end (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts);
    - wsd: constant until `decay_steps` before the end, then linear to the end (Hu et al. 2024, arXiv 2404.06395);
    - constant.
    """
    if step < 1:
        raise ValueError(f"steps are numbered from 1, got {step}")
    steps = min(used_up, 1.0) * training.max_steps
    return _rate(step, training) if steps <= step else min(_rate(step, training), _rate(steps, training))


def _rate(step: float, training: TrainingConfig) -> float:
    peak = training.learning_rate
    if step < training.warmup_steps:
        return peak * step / training.warmup_steps
    if training.schedule == "cosine":
        start = max(training.warmup_steps, 1)  # the step that has the peak
        done = _fraction(step, start, training.max_steps)
        return peak * _between(0.5 * (1 + math.cos(math.pi * done)), done, training.final_learning_rate_fraction)
    if training.schedule == "wsd":
        done = _fraction(step, training.max_steps - training.decay_steps, training.max_steps)
        return peak * _between(1 - done, done, training.final_learning_rate_fraction)
    return peak


def _fraction(step: float, start: int, end: int) -> float:
    """Return the position of `step` between `start` (0) and `end` (1), clamped to that range."""
    if step >= end:
        return 1.0
    return max(0, step - start) / (end - start)


def _between(weight: float, done: float, final: float) -> float:
    """Return final + (1 - final) * weight, but exactly 1 and exactly `final` at the ends."""
    if done == 0.0:
        return 1.0
    return final if done == 1.0 else final + (1 - final) * weight
