"""First lines of a job: its run, data and model, and the settings that changed since the job before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.plurals import number_of
from stlm.config import RunConfig, TrainingConfig, written
from stlm.config.yaml.build import to_dict
from stlm.stlm import STLM
from stlm.training.metrics.monitor import readable_time
from stlm.training.optim.limits import limits_of, used_up
from stlm.training.optim.schedules import learning_rate_at
from stlm.training.run.progress import RunProgress
from stlm.training.run.run_directory import Start

SCHEDULE = ("max_steps", "warmup_steps", "decay_steps", "schedule", "learning_rate", "final_learning_rate_fraction")


def opening_lines(
    config: RunConfig, model: STLM, data: str, run_dir: Path, start: Start, progress: RunProgress
) -> Iterator[str]:  # fmt: skip
    """Yield lines on the run, the data that `data` describes, the model, and the checkpoint that the job resumes."""
    parts, training = config.model, config.training
    steps = " or ".join([number_of(training.max_steps, "step"), *limits_of(training).values()])
    how = f"a new run of {steps}"
    if start.checkpoint is not None:
        is_last = not progress.pending and progress.is_finished(training)
        how = f"continuing from {start.checkpoint}, {'which is its last step' if is_last else f'of {steps}'}"
    yield f"run: {run_dir}, {how}"
    yield f"data: {data}"
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = model.num_parameters()
    yield (
        f"model: {' → '.join(part.kind for part in (parts.embedder, parts.core, parts.head))}, width "
        f"{parts.width}, context {parts.context_length}, {total:,} parameters"
        + (f", of which {learning:,} learn" if learning != total else "")
    )
    for note in start.notes:
        yield f"warning: {note}"


def change_lines(
    changed: Mapping[str, Sequence[Any]], training: TrainingConfig, before: TrainingConfig | None, progress: RunProgress
) -> Iterator[str]:  # fmt: skip
    """Yield lines on the settings that differ from those of the job before, and on the new learning rate if they
    affect it. `before`: the earlier settings, if known."""
    for key, (was, now) in changed.items():
        yield f"changed: {key} from {written(was)} to {written(now)}"
    affecting = {*SCHEDULE, *(f"limits.{name}" for name in to_dict(training.limits))}
    if before is None or not {key.removeprefix("training.") for key in changed} & affecting:
        return
    ends = " or ".join([f"step {training.max_steps:,}", *limits_of(training).values()])
    step, seen = progress.step, (progress.ids_seen, progress.bytes_seen, progress.seconds)
    then = learning_rate_at(max(step, 1), before, used_up(before, step - 1, *seen))
    next_rate = learning_rate_at(step + 1, training, progress.used_up(training))
    yield f"the schedule ({training.schedule}) now ends at {ends}" + (
        ", where this run is"
        if progress.is_finished(training)
        else f"; the learning rate of step {step + 1:,} is {next_rate:.2e}, that of step {step:,} was {then:.2e}"
    )


def evals_cost_line(seconds: float, every: int, step: int, last_step: int) -> str:
    """Return a line on the time that evaluations by tasks, every `every` steps, take until `last_step`."""
    more = -(-last_step // every) - step // every
    times = "once more" if more == 1 else f"{more:,} times more"
    return (
        f"an evaluation by tasks takes {seconds:.1f} s; with evals.every_steps = {every} that is done {times}, "
        f"{readable_time(more * seconds)} in all (evals.items scores a sample)"
    )
