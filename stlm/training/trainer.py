"""The Trainer, whose training loop is short:

    for step in trainer.steps():
        loss = trainer.train_step(step)
        trainer.log(step, loss)
        trainer.val_step()
        trainer.save_checkpoint(step)

Steps are numbered from 1: "at step s" means after the s-th update. `log`, `val_step` and `save_checkpoint` act only
when they are due, and at the last step. All ranks call every method.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch

from data_pipeline.loading.prepared_data import TrainLoader, ValidationLoader
from data_pipeline.plurals import number_of
from stlm.checkpoints import checkpoints_of, newest_checkpoint, step_of
from stlm.config import ON_REQUEST, RunConfig, TrainingConfig, written
from stlm.config.yaml.build import to_dict
from stlm.errors import ConfigError, NonFinite, StlmError, Stopped
from stlm.objectives import build_objective
from stlm.stlm import STLM
from stlm.training.deepspeed.configuration import checked_deepspeed_config
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.loss_scale import LossScale
from stlm.training.deepspeed.precision import Precision, choose_precision
from stlm.training.deepspeed.state_transfer import full_state, load_state, whole_weights
from stlm.training.distributed.agreement import fingerprints, refuse_differences
from stlm.training.distributed.connection import Distributed
from stlm.training.distributed.stopping import Interrupted
from stlm.training.distributed.watchdog import watched
from stlm.training.entropy import begin_entropy_patching
from stlm.training.init_from import begin_from, told_of_freezing
from stlm.training.loaders import batch_sizes_of
from stlm.training.metrics.monitor import Monitor, progress_line, readable_time
from stlm.training.metrics.throughput import Gauges
from stlm.training.metrics.wandb_mirror import check_wandb
from stlm.training.optim.limits import limits_of, used_up
from stlm.training.optim.schedules import learning_rate_at
from stlm.training.recovery import Recovery
from stlm.training.run.async_writer import AsyncWriter
from stlm.training.run.checkpoint import (
    check_checkpoint,
    checkpoint_path,
    is_scheduled,
    prune_checkpoints,
    read_progress,
    read_state,
    refuse_other_model,
    write_checkpoint,
)
from stlm.training.run.run_directory import RunDirectory, Start
from stlm.training.run.state import State
from stlm.training.step import Passes

RESUME = ("auto", "never", "must")
SPLITS = {"tasks": "evals", "validation": "validation"}  # pending work → the split of its records

# Settings that may change on request (--allow-change): they affect the result.
REQUESTED = {
    f"training.{field.name}" for field in fields(TrainingConfig) if field.metadata.get("may_change") == ON_REQUEST
}

# Evaluation during training: (step, weights by name) → figures for the record, a line to print.
Evaluate = Callable[[int, Iterable[tuple[str, torch.Tensor]]], tuple[dict[str, Any], str]]


class Trainer:
    """Training of one model in one run directory, from its newest checkpoint on.

    Without a `deepspeed_config` the engine runs at ZeRO stage 0. `resume`: "auto" resumes the run that the directory
    holds or begins one, "must" refuses to begin one, "never" refuses to resume. `allow_change`: a resumed run may have
    another learning rate, schedule or batch size than before; weights and moments stay. All ranks call `evaluate` every
    `evals.every_steps`; the weights that it gets belong to the engine and must be copied. Without `distributed` the
    trainer joins the ranks. Raises ConfigError or CheckpointError where the run cannot begin or resume as requested.
    """

    def __init__(
        self,
        config: RunConfig,
        model: STLM,
        optimizer: torch.optim.Optimizer,
        train_loader: TrainLoader,
        validation_loader: ValidationLoader,
        *,
        run_dir: str | os.PathLike[str],
        deepspeed_config: Mapping[str, Any] | None = None,
        resume: str = "auto",
        allow_change: bool = False,
        evaluate: Evaluate | None = None,
        distributed: Distributed | None = None,
    ) -> None:
        if resume not in RESUME:
            raise ConfigError(f"resume: got {resume!r}, expected one of {', '.join(RESUME)}")
        self.config = config
        self.model = model
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self._evaluate = evaluate
        self.objective = build_objective(config.training)
        self.step = 0  # updates made
        self.seen = {"ids": 0, "bytes": 0}
        self.seconds = 0.0  # of training before the newest step, the same on all ranks
        self.recovery = Recovery(config.training.recovery)
        self.validation_bits_per_byte: float | None = None  # of the newest validation

        self.distributed = distributed = distributed or Distributed.join()
        self.run_dir = Path(run_dir)
        self._run = RunDirectory(run_dir)
        refuse_differences(distributed, fingerprints(config, deepspeed_config, train_loader.fingerprint))
        if config.training.wandb:
            distributed.on_rank_zero(check_wandb)
        deepspeed_config = deepspeed_config or {"zero_optimization": {"stage": 0}}
        chosen = distributed.on_rank_zero(
            lambda: choose_precision(config.training.precision, deepspeed_config)._asdict()
        )
        precision = Precision(**chosen)
        checked_deepspeed_config(model, config.training, precision, deepspeed_config, distributed)
        # Initial weights that do not fit are refused before the run directory is made.
        is_new = distributed.on_rank_zero(lambda: newest_checkpoint(self.run_dir) is None)
        notes = self._begin(resume) if is_new else []
        known = config, train_loader.fingerprint, resume, allow_change
        start = Start(**distributed.on_rank_zero(lambda: self._run.open(*known)._asdict()))
        distributed.on_every_rank(self._run.check_shared)
        begun = read_progress(start.checkpoint) if start.checkpoint else {}
        self.step = begun.get("step", 0)
        self._pending = list(begun.get("pending") or ())  # work that the newest step still needs, see `_save`
        self.monitor = Monitor(self.run_dir)
        wandb_config = to_dict(config) if config.training.wandb else None
        again = [SPLITS[name] for name in self._pending if name in SPLITS]
        distributed.on_rank_zero(lambda: self.monitor.open(self.step + 1, wandb_config, again))
        train_loader.batch_sizes = batch_sizes_of(begun, config.training.batch_size)
        self._introduce(start)
        if start.checkpoint is None:
            for note in notes if is_new else self._begin(resume):  # `open` found all checkpoints damaged
                self.monitor.say(note)
        if frozen := told_of_freezing(model, config.training):
            self.monitor.say(frozen)

        self.engine = Engine(model, optimizer, config.training, precision, deepspeed_config, distributed)
        self.monitor.say(f"{distributed.ranks}; ZeRO stage {self.engine.stage}; {precision.name}: {precision.reason}")
        learns_whole = all(parameter.requires_grad for parameter in model.parameters())
        self._gauges = Gauges(self.engine.device, precision.name, learns_whole, distributed)
        self.monitor.say(self._gauges.told)
        self._passes = Passes(config, model, self.engine, self.objective, self._gauges)
        if start.checkpoint is not None:
            self.load_checkpoint(start.checkpoint)
            self._tell_changes(start.changed)
        changed = {"changed": start.changed} if start.changed else {}
        distributed.on_rank_zero(lambda: self._run.record_start(self.step, self._environment() | changed))
        stacks = distributed.on_rank_zero(lambda: self.run_dir / "stacks" / time.strftime("%Y-%m-%d_%H-%M-%S"))
        distributed.watch_for_hangs(stacks, config.training.hang_timeout_s)
        self._saved_step = self.step
        self._saved_on_schedule = begun.get("scheduled", True)
        self._copied: State | None = None  # the state in the newest checkpoint; the next one reuses its memory
        self._writer = AsyncWriter()  # writes checkpoints, on rank 0
        self._validated_step: int | None = None
        self._last: dict[str, float] = {}  # figures of the newest step; empty if it made no update
        self._trouble = ""  # why the newest skipped step made no update
        self._has_asked = False  # whether this job has evaluated by tasks
        distributed.signals.listen()

    def _begin(self, resume: str) -> list[str]:
        """Set the initial weights of a new run, unless `resume` is "must". Returns lines for the log."""
        if resume == "must":
            return []
        taken_over = self.distributed.on_every_rank(lambda: begin_from(self.model, self.config.training))
        notes = begin_entropy_patching(self.model, self.train_loader, self.config.training.batch_size, self.distributed)
        return [*filter(None, [taken_over]), *notes]

    # ------------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps that remain.

        Between two steps the ranks agree whether one of them was asked to stop, by SIGINT, SIGTERM, SIGUSR1, SIGHUP or
        the end of its launcher. If so, a checkpoint is saved and Stopped is raised. They also agree within validations
        and tasks, which may take long: that work is abandoned, and done when the run resumes. An error of the thread
        that writes checkpoints is raised here. When the loop ends, the last checkpoint is on disk; the run directory is
        released in every case.
        """
        started = time.monotonic() - self.seconds
        finished = self._is_finished()
        try:
            if self.step == 0 and self.config.evals.at_start:
                self._ask()
            elif self._pending:
                self._do_pending()
            while not finished:
                yield self.step + 1
                finished = self._is_finished()
                asked = self.distributed.signals.reason()
                flags = [float(asked is not None), float(self._writer.failed)]
                flags.append(time.monotonic() - started if self.distributed.rank == 0 else 0.0)
                stop, failed, self.seconds = (
                    (0.0, 0.0, self.seconds) if finished else self.distributed.sum_over_ranks(flags)
                )
                if failed:
                    self.distributed.on_rank_zero(self._writer.wait)
                if stop:
                    self._end_on_request()
            self.distributed.on_rank_zero(self._writer.wait)
        finally:
            self.close()

    @watched("a training step")
    def train_step(self, step: int) -> float:
        """Make update `step`, the next one. Returns the loss before the update, in nats per id over the whole batch.

        Where the loss or the gradient is not finite, no update is made; recovery.py describes what follows. Raises
        NonFinite where recovery is not possible; the model is unchanged then.
        """
        if step != self.step + 1:
            raise ValueError(f"the next step is {self.step + 1}, got {step}")
        with self._gauges.step():
            loss, go_back = self._update(step)
        if go_back:
            self._roll_back()
        return loss

    def _update(self, step: int) -> tuple[float, bool]:
        """Make the step. Returns its loss, and whether the run has to roll back to a checkpoint."""
        with self.distributed.stopwatch.phase("data"):
            micro_batches = self._passes.read(self.train_loader, step)
        ids, bytes = self._passes.count(micro_batches)
        terms, measures, local = self._passes.gradient(micro_batches, ids, self._used_up())
        nats, *rest = self.distributed.sum_over_ranks([math.fsum(column) for column in zip(*local, strict=True)])
        added, measured = rest[: len(terms)], rest[len(terms) :]
        learning_rate = learning_rate_at(step, self.config.training, self._used_up())
        gradient_norm = self.engine.step(learning_rate)
        loss_value = nats / ids
        whole_loss = math.fsum((nats, *added)) / ids
        self.step = step
        overflowed = self.engine.overflowed and math.isfinite(whole_loss)
        go_back = not overflowed and self.recovery.judge(step, whole_loss, gradient_norm)
        if math.isfinite(whole_loss) and math.isfinite(gradient_norm):
            self.seen["ids"] += int(ids)
            self.seen["bytes"] += int(bytes)
            self._last = {
                "loss": loss_value,
                "bits_per_byte": nats / math.log(2) / bytes if bytes else math.nan,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                **{f"{name}_loss": value / ids for name, value in zip(terms, added, strict=True)},
                **{
                    name: total / count
                    for name, total, count in zip(measures, measured[::2], measured[1::2], strict=True)
                },
            }
            if (scale := self.engine.loss_scale) is not None:
                self._last |= {"loss_scale": scale.value, "overflowed_steps": scale.overflowed_steps}
        elif overflowed:
            self._last = {}
            self.monitor.say(
                f"step {step}: a gradient overflowed in fp16; its update is left out, the loss scale halved"
            )
        else:
            self._tell_skipped(whole_loss, [math.fsum(row[: 1 + len(terms)]) for row in local])
        self._gauges.add(bytes)
        return loss_value, go_back

    def log(self, step: int, loss: float) -> None:
        """Record the newest step: every `log_every_steps`, and the first and the last one.

        A step that made no update is not recorded; `train_step` has logged it.
        """
        training = self.config.training
        if not self._last or (not self._due(training.log_every_steps) and step != 1):
            return
        record = {
            "step": step,
            "split": "train",
            **self._last,
            "gradient_norm_of": self.engine.gradient_norms(),
            "loss": loss,
            "epoch": self.train_loader.epoch(step),
            "ids_seen": self.seen["ids"],
            "bytes_seen": self.seen["bytes"],
            "timing": self._gauges.read(),
        }
        seconds_left = self._gauges.left(round((step + 1) / self._used_up()) - step)
        self._tell(record, progress_line(record, training.max_steps, seconds_left))

    def val_step(self) -> float | None:
        """Validate every `eval_every_steps`, and at the last step. Returns bits per byte if it did.

        Also evaluates by tasks every `evals.every_steps`.
        """
        self._ask()
        return self._validate()

    def _validate(self) -> float | None:
        if not self._due(self.config.training.eval_every_steps):
            return None
        started = time.perf_counter()
        try:
            stop = self.distributed.agreed_stop()
            by_source = self._passes.validate(self.validation_loader, stop)
        except Interrupted:
            self._end_on_request("validation", "checkpoint")
        seconds = time.perf_counter() - started
        nats, ids, bytes = (math.fsum(column) for column in zip(*by_source.values(), strict=True))
        self.validation_bits_per_byte = nats / math.log(2) / bytes
        self._validated_step = self.step
        record = {
            "step": self.step,
            "split": "validation",
            "loss": nats / ids,
            "bits_per_byte": self.validation_bits_per_byte,
            "timing": {"seconds": seconds},
        }
        parts = {name: nats / math.log(2) / bytes for name, (nats, _, bytes) in by_source.items() if bytes}
        if len(by_source) > 1:
            record["bits_per_byte_of"] = parts
        self._tell(
            record,
            f"step {self.step}/{self.config.training.max_steps}  validation {record['loss']:.4f} nats/id  "
            f"{self.validation_bits_per_byte:.4f} bits/byte  ({bytes:,.0f} bytes in {readable_time(seconds)})"
            + "".join(f"\n  {value:.4f} bits/byte  {name}" for name, value in parts.items() if len(by_source) > 1),
        )
        return self.validation_bits_per_byte

    def save_checkpoint(self, step: int) -> Path | None:
        """Save every `save_every_steps`, and at the last step. Returns the checkpoint's path if one was due.

        The state is copied at once and written to disk during the next steps; the end of the loop waits for it.
        """
        return self._save(scheduled=True) if self._due(self.config.training.save_every_steps) else None

    # ------------------------------------------------------------------ parts of the loop

    def validate(self) -> tuple[float, float, float]:
        """Return (nats, ids, bytes) of one pass over all validation windows, summed in float64."""
        nats, ids, bytes = (math.fsum(column) for column in zip(*self.validate_sources().values(), strict=True))
        return nats, ids, bytes

    def validate_sources(self) -> dict[str, tuple[float, float, float]]:
        """Return (nats, ids, bytes) for each source of the validation text, by name."""
        return self._passes.validate(self.validation_loader)

    def _introduce(self, start: Start) -> None:
        """Print the first lines of a job: run, data, model, and the checkpoint that it resumes from."""
        parts, training = self.config.model, self.config.training
        steps = " or ".join([number_of(training.max_steps, "step"), *limits_of(training).values()])
        how = f"a new run of {steps}"
        if start.checkpoint is not None:
            is_last = self._is_done_at(start.checkpoint)
            how = f"continuing from {start.checkpoint}, {'which is its last step' if is_last else f'of {steps}'}"
        self.monitor.say(f"run: {self.run_dir}, {how}")
        self.monitor.say(f"data: {self.train_loader.description}")
        learning = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        total = self.model.num_parameters()
        self.monitor.say(
            f"model: {' → '.join(part.kind for part in (parts.embedder, parts.core, parts.head))}, width "
            f"{parts.width}, context {parts.context_length}, {total:,} parameters"
            + (f", of which {learning:,} learn" if learning != total else "")
        )
        for note in start.notes:
            self.monitor.say(f"warning: {note}")

    def _is_done_at(self, checkpoint: Path) -> bool:
        made = read_progress(checkpoint)
        seen = made["ids_seen"], made["bytes_seen"], made.get("seconds") or 0.0
        return not made.get("pending") and used_up(self.config.training, made["step"], *seen) > 1

    def _tell_changes(self, changed: Mapping[str, Sequence[Any]]) -> None:
        """Print the settings that differ from those of the job before, and the new course of the learning rate. Record
        the settings that affect the result."""
        if not changed:
            return
        for key, (was, now) in changed.items():
            self.monitor.say(f"changed: {key} from {written(was)} to {written(now)}")
        training, before = self.config.training, self._run.saved
        ends = " or ".join([f"step {training.max_steps:,}", *limits_of(training).values()])
        limits = (f"limits.{name}" for name in to_dict(training.limits))
        scheduled = {"max_steps", "warmup_steps", "decay_steps", "schedule", "learning_rate",
                     "final_learning_rate_fraction", *limits}  # fmt: skip
        if before is not None and {key.removeprefix("training.") for key in changed} & scheduled:
            made = self.step - 1, self.seen["ids"], self.seen["bytes"], self.seconds
            then = learning_rate_at(max(self.step, 1), before.training, used_up(before.training, *made))
            next_rate = learning_rate_at(self.step + 1, training, self._used_up())
            self.monitor.say(
                f"the schedule ({training.schedule}) now ends at {ends}"
                + (
                    ", where this run is"
                    if self._is_finished()
                    else f"; the learning rate of step {self.step + 1:,} is {next_rate:.2e}, that of step "
                    f"{self.step:,} was {then:.2e}"
                )
            )
        asked = {key: values for key, values in changed.items() if key in REQUESTED}
        if asked:
            was, now = ({key: values[place] for key, values in asked.items()} for place in (0, 1))
            self.distributed.on_rank_zero(
                lambda: self.monitor.record({"step": self.step, "split": "changes", "was": was, "now": now})
            )

    def _ask(self) -> None:
        """Evaluate by tasks every `evals.every_steps`, after the last step, and before the first one with
        `evals.at_start`. The first evaluation in a job prints its cost."""
        every = self.config.evals.every_steps
        if self._evaluate is None or every is None or not self._due(every):
            return
        started = time.perf_counter()
        evaluate, weights = self._evaluate, self.distributed.interruptible.first(whole_weights(self.engine))
        answer = self.distributed.interruptible.run(lambda: evaluate(self.step, weights))
        if answer is None:
            self._end_on_request("tasks", "validation", "checkpoint")
        figures, text = answer
        seconds = time.perf_counter() - started
        self._tell(
            {"step": self.step, "split": "evals", **figures, "timing": {"seconds": seconds}},
            f"step {self.step}/{self.config.training.max_steps}  {text}  (in {readable_time(seconds)})",
        )
        if not self._has_asked and not self._is_finished():
            last = round((self.step + 1) / self._used_up())
            more = -(-last // every) - self.step // every
            times = "once more" if more == 1 else f"{more:,} times more"
            self.monitor.say(
                f"an evaluation by tasks takes {seconds:.1f} s; with evals.every_steps = {every} that is done {times}, "
                f"{readable_time(more * seconds)} in all (evals.items scores a sample)"
            )
        self._has_asked = True

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Restore weights, moments and counters from a checkpoint of any number of ranks and any ZeRO stage."""
        path = Path(path)
        refuse_other_model(path, self.config.model, self.model.tokenizer)
        context = self.config.model.context_length
        example = torch.zeros(1, context, dtype=torch.long, device=self.engine.device)
        load_state(self.engine, read_state(path), [example])
        progress = read_progress(path)
        self.step = progress["step"]
        self.engine.count_steps(self.step)
        self.seen = {"ids": progress["ids_seen"], "bytes": progress["bytes_seen"]}
        self.seconds = progress.get("seconds") or 0.0
        if self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(**progress.get("loss_scale") or {})
        self.recovery = Recovery(self.config.training.recovery, progress.get("recovery"))

    def close(self) -> None:
        """Finish pending writes, release the run directory and restore the signal handlers. Safe to call twice."""
        try:
            self._writer.wait()
        except StlmError as error:  # the end of the loop waits before this; otherwise another error is being raised
            self.monitor.say(f"error: {error}")
        self.distributed.watchdog.stop()
        self.distributed.signals.restore()
        self.monitor.close()
        self._run.close()

    def _do_pending(self) -> None:
        """Do the work that an interruption of the newest step left undone."""
        pending, self._pending = self._pending, []
        if "tasks" in pending:
            self._ask()
        if "validation" in pending:
            self._validate()
        if "checkpoint" in pending:
            self.save_checkpoint(self.step)

    def _end_on_request(self, *given_up: str) -> NoReturn:
        """Save, release the run directory and raise Stopped. `given_up`: work of this step that is still to be done."""
        asked = f"stopped by {self.distributed.signals.reason() or 'a request to another rank'}"
        if self.step == 0:  # nothing is lost
            text = f"{asked} before the first step"
        else:
            self._save(scheduled=False, pending=given_up)
            self.distributed.on_rank_zero(self._writer.wait)
            text = f"{asked} at step {self.step} after saving"
        self.monitor.say(f"{text}; the same command {'continues' if self.step else 'begins'} it")
        self.close()
        raise Stopped(text)

    def _save(self, scheduled: bool, pending: Sequence[str] = ()) -> Path:
        """Save a checkpoint, unless there is one of this step. A scheduled one replaces one made by an interruption.

        `pending`: work to be done first when the run resumes.
        """
        path = checkpoint_path(self.run_dir, self.step)
        if self._saved_step == self.step and (self._saved_on_schedule or not scheduled) and not pending:
            return path
        self.distributed.on_rank_zero(self._writer.wait)  # before another copy of the state is made
        state = self._copied = full_state(self.engine, reused=self._copied)
        progress = {
            "step": self.step,
            "ids_seen": self.seen["ids"],
            "bytes_seen": self.seen["bytes"],
            "seconds": self.seconds if self.config.training.limits.wall_time_s else None,  # only this limit reads it
            "sequences_seen": self.train_loader.sequences(self.step),
            "batch_sizes": self.train_loader.batch_sizes,
            "seed": self.config.seed,  # with the step, it determines all randomness
            "loss_scale": None if self.engine.loss_scale is None else self.engine.loss_scale._asdict(),
            "recovery": self.recovery.state(),
            "data_fingerprint": self.train_loader.fingerprint,
            "tokenizer_fingerprint": self.model.tokenizer.fingerprint,
            "validation_bits_per_byte": self.validation_bits_per_byte if self._validated_step == self.step else None,
            "scheduled": scheduled,
            "pending": list(pending),
        }

        def write() -> None:
            write_checkpoint(path, self.config.model, self.model.tokenizer, state, progress)
            prune_checkpoints(self.run_dir, self.config.training)

        self.distributed.on_rank_zero(lambda: self._writer.start(write))
        self._saved_step, self._saved_on_schedule = self.step, scheduled
        return path

    def _tell(self, record: dict[str, Any], line: str) -> None:
        def tell() -> None:
            self.monitor.record(record)
            self.monitor.say(line)

        self.distributed.on_rank_zero(tell)  # an error, such as a full disk, is raised on all ranks

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self._is_finished()

    def _used_up(self) -> float:
        return used_up(self.config.training, self.step, self.seen["ids"], self.seen["bytes"], self.seconds)

    def _is_finished(self) -> bool:
        return self._used_up() > 1

    def _tell_skipped(self, loss: float, nats: list[float]) -> None:
        """Log a step that made no update, and the rows of its batch that caused it, as far as they are known.

        `nats`: the loss of each micro-batch of this rank.
        """
        self._last = {}
        what = "gradient" if math.isfinite(loss) else "loss"
        size, total = self.engine.split.micro_batch_size, self.config.training.batch_size
        flags = [0.0] * (total // size)
        for index, value in enumerate(nats):
            flags[self.distributed.rank * self.engine.split.accumulation + index] = float(not math.isfinite(value))
        bad = [index for index, flag in enumerate(self.distributed.sum_over_ranks(flags)) if flag] or range(len(flags))
        rows = ", ".join(f"{i * size}-{(i + 1) * size - 1}" if size > 1 else str(i) for i in bad)
        self._trouble = f"the {what} of step {self.step} is not finite (rows {rows} of its batch)"
        self._tell_recovery(f"{self._trouble}; its update is left out")

    def _roll_back(self) -> None:
        """Replace the weights by those of an older checkpoint; the step number does not go back.

        Only scheduled checkpoints are used, so an interrupted run rolls back to the same one as an uninterrupted run.
        Where none is left, or the limit of rollbacks is reached, raises NonFinite, except after a mere loss spike.
        """
        since, step, recovery = self.recovery.since, self.step, self.recovery
        assert since is not None

        def find() -> Path | None:
            self._writer.wait()
            older = (path for path in checkpoints_of(self.run_dir) if step_of(path) < since)
            return next((path for path in older if check_checkpoint(path) is None and is_scheduled(path)), None)

        found = self.distributed.on_rank_zero(find) if recovery.may_roll_back else None
        if found is not None:
            self.load_checkpoint(found)
            recovery.rolled_back(self.step)
            self.step, self.recovery = step, recovery
            self.engine.count_steps(step)
            self._tell_recovery(
                f"going back to the weights of step {step_of(found)} and on with the data behind step {step} "
                f"(time {recovery.rollbacks} of at most {self.config.training.recovery.max_rollbacks})"
            )
        elif not self._last:
            skipped, went_back = number_of(recovery.skipped, "step"), number_of(recovery.rollbacks, "time")
            text = (
                f"{self._trouble}; no update was made in {skipped}, and after going back {went_back} "
                f"nothing is left to try. {self._last_checkpoint()}. Look at "
                f"the text: python scripts/describe.py {self.run_dir} --step {step}. A lower training.learning_rate or "
                "a longer warm-up may help"
            )
            self.monitor.say(f"error: {text}")
            raise NonFinite(text)

    def _last_checkpoint(self) -> str:
        return f"Last checkpoint: step {self._saved_step}" if self._saved_step else "No checkpoint was saved yet"

    def _tell_recovery(self, line: str) -> None:
        counts = {"skipped": self.recovery.skipped, "rollbacks": self.recovery.rollbacks}
        self._tell({"step": self.step, "split": "recovery", **counts}, f"warning: {line}")

    def _environment(self) -> dict[str, Any]:
        return {
            "ranks": self.distributed.world_size,
            "launcher": self.distributed.ranks.source,
            "device": str(self.engine.device),
            "threads": torch.get_num_threads(),
            "precision": self.engine.precision._asdict(),
            "deepspeed_config": self.engine.config,
        }
