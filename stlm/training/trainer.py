"""The Trainer, whose training loop is short:

    for step in trainer.steps():
        loss = trainer.train_step(step)
        trainer.log(step, loss)
        trainer.val_step()
        trainer.save_checkpoint(step)

Steps are numbered from 1: "at step s" means after the s-th update. `log`, `val_step` and `save_checkpoint` act only
when they are due, and at the last step. All ranks call every method.

A loop without `steps` counts micro-steps from 0 (micro_steps.py), and the same methods act at once. `train_step(step)`
makes an update where (step + 1) % grad_accum_steps == 0; with the same training.micro_batch_size the losses equal those
of the loop above. After a signal the next update is not made: the run is saved, and the program exits with code 3.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from data_pipeline.loading.prepared_data import TrainLoader, ValidationLoader
from stlm.config import RunConfig
from stlm.errors import ConfigError, NonFinite, StlmError, Stopped
from stlm.objectives import build_objective
from stlm.stlm import STLM
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.state_transfer import whole_weights
from stlm.training.distributed.connection import Distributed
from stlm.training.distributed.stopping import Interrupted
from stlm.training.distributed.watchdog import watched
from stlm.training.metrics.monitor import Monitor, progress_line, readable_time
from stlm.training.metrics.records import step_figures, training_record, validation_line, validation_record
from stlm.training.metrics.summary import evals_cost_line
from stlm.training.metrics.throughput import Throughput
from stlm.training.micro_steps import MicroSteps
from stlm.training.opening import check_run, compile_or_not, open_run, record_start
from stlm.training.recovery import Recovery
from stlm.training.run.async_writer import AsyncWriter
from stlm.training.run.checkpoint import checkpoint_path
from stlm.training.run.run_directory import RunDirectory
from stlm.training.run.saver import Saver
from stlm.training.step import TrainingStep
from stlm.training.validation import Sums, total, validate

RESUME = ("auto", "never", "must")

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
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self.run_dir = Path(run_dir)
        self.distributed = distributed = distributed or Distributed.join()
        self.objective = build_objective(config.training)
        self._evaluate = evaluate
        deepspeed_config = deepspeed_config or {"zero_optimization": {"stage": 0}}
        precision = check_run(config, model, train_loader, distributed, deepspeed_config)

        opened = open_run(config, model, train_loader, distributed, self.run_dir, resume, allow_change)
        self.monitor, self.progress = opened.monitor, opened.progress

        self.model = model
        self.engine = engine = Engine(model, optimizer, config.training, precision, deepspeed_config, distributed)
        self.monitor.say(f"{distributed.ranks}; ZeRO stage {engine.stage}; {precision.name}: {precision.reason}")
        learns_whole = all(parameter.requires_grad for parameter in model.parameters())
        self.throughput = Throughput(engine.device, precision.name, learns_whole, distributed)
        self.monitor.say(self.throughput.summary)
        compile_or_not(opened, config, model, engine, self.throughput.peak.flops)
        self._step = TrainingStep(config, model, engine, self.objective, train_loader, self.throughput)
        self._saver = Saver(config, model, engine, train_loader, self.run_dir)

        self.recovery = Recovery(config.training.recovery)
        if opened.start.checkpoint is not None:
            self.load_checkpoint(opened.start.checkpoint)
        record_start(opened, config, engine, self.progress)
        self._saver.step = self.step
        self._micro_steps = MicroSteps(self.step, self.grad_accum_steps)  # of a loop without `steps`
        self._figures: dict[str, float] = {}  # of the newest step; empty if it made no update
        self._loss = math.nan  # of the newest step
        self._logged_step: int | None = None
        self._evaluated_step: int | None = None  # the newest step that this job has evaluated by tasks
        self._begun: float | None = None  # when the first step began, less the seconds of earlier jobs
        self._in_steps = False  # whether the loop runs over `steps`
        distributed.signals.listen()
        self._outlasting = self._saver.writer, self.monitor, distributed, opened.directory
        weakref.finalize(self, _release, *self._outlasting)  # for a loop without `steps`

    # ------------------------------------------------------------------ the loop

    @property
    def step(self) -> int:
        """Updates made."""
        return self.progress.step

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of each rank in an update: batch_size / ranks / micro_batch_size."""
        return self.engine.split.accumulation

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps that remain.

        Between two steps the ranks agree whether one of them was asked to stop, by SIGINT, SIGTERM, SIGUSR1, SIGHUP or
        the end of its launcher. If so, a checkpoint is saved and Stopped is raised. They also agree within validations
        and tasks, which may take long: that work is abandoned, and done when the run resumes. An error of the thread
        that writes checkpoints is raised here. When the loop ends, the last checkpoint is on disk; the run directory is
        released in every case.
        """
        self._in_steps = True
        try:
            finished = self._is_finished()
            self._begin()
            while not finished:
                yield self.step + 1
                finished = self._is_finished()
                if not finished:
                    self._check_requests()
            self._saver.wait()
        finally:
            self._in_steps = False
            self.close()

    def train_step(self, step: int) -> float:
        """Make update `step`, the next one. Returns the loss before the update, in nats per id over the whole batch.

        Outside of `steps`: make the update that micro-step `step` completes, if it does. Returns the loss of the newest
        update; nan where this job has made none. The last update of the run is recorded, validated and saved at once,
        whatever the loop does. Where the loss or the gradient is not finite, no update is made;
        recovery.py describes what follows. Raises NonFinite where recovery is not possible; the model is unchanged
        then.
        """
        if not self._in_steps:
            is_first = self._begun is None
            if is_first and self._micro_steps.reaches(step, self.step):
                self._begin()
            if not self._micro_steps.advance(step, self.step, self._is_finished()):
                return self._loss
            if not is_first:
                self._check_requests()
        elif step != self.step + 1:
            raise ValueError(f"the next step is {self.step + 1}, got {step}")
        self._make_update(self.step + 1)
        if not self._in_steps and self._is_finished():
            self._finish()
        return self._loss

    @watched("a training step")
    def _make_update(self, step: int) -> None:
        with self.throughput.step():
            result = self._step(step, self._used_up())
            self._loss = result.loss
            self.progress.step, self.progress.validation_bits_per_byte = step, None
            overflowed = self.engine.overflowed and math.isfinite(result.total_loss)
            go_back = not overflowed and self.recovery.judge(step, result.total_loss, result.gradient_norm)
            self._figures = {}
            if result.is_finite:
                self.progress.ids_seen += int(result.ids)
                self.progress.bytes_seen += int(result.bytes)
                self._figures = step_figures(result, self.engine.loss_scale)
            elif overflowed:
                self.monitor.say(
                    f"step {step}: a gradient overflowed in fp16; its update is left out, the loss scale halved"
                )
            else:
                self._log_recovery(self.recovery.skipped_line(step, result.total_loss, result.own_losses, self.engine))
            self.throughput.add(result.bytes)
            if warning := self.engine.compiled.take_warning():
                self.monitor.say(f"warning: {warning}")
        if go_back:
            self._roll_back()

    def log(self, step: int, loss: float | None, split: str = "train") -> None:
        """Record the newest step: every `log_every_steps`, and the first and the last one. Once is enough.

        A step that made no update is not recorded; `train_step` has logged it. `val_step` records its own figures; with
        another `split` or value, the value is recorded as the loss of that split.
        """
        if self._micro_steps.is_idle or loss is None:
            return
        if split != "train":
            if loss != self.progress.validation_bits_per_byte:
                self._log({"step": self.step, "split": split, "loss": loss}, f"step {self.step}  {split} {loss:.4f}")
            return
        training = self.config.training
        is_due = self._is_due(training.log_every_steps) or self.step == 1
        if not self._figures or not is_due or self._logged_step == self.step:
            return
        self._logged_step = self.step
        progress, epoch, norms = self.progress, self.train_loader.epoch(self.step), self.engine.gradient_norms()
        record = training_record(self._figures | {"loss": loss}, progress, epoch, norms, self.throughput.read())
        seconds_left = self.throughput.left(round((self.step + 1) / self._used_up()) - self.step)
        self._log(record, progress_line(record, training.max_steps, seconds_left))

    def val_step(self) -> float | None:
        """Validate every `eval_every_steps`, and at the last step. Returns bits per byte if it did.

        Also evaluates by tasks every `evals.every_steps`. Outside of `steps` it acts at once, and returns nan in
        micro-steps that do nothing.
        """
        if self._micro_steps.is_idle:
            return math.nan
        self._run_evals()
        return self._validate()

    def save_checkpoint(self, step: int) -> Path | None:
        """Save every `save_every_steps`, and at the last step. Returns the checkpoint's path if one was due.

        The state is copied at once and written to disk during the next steps; the end of the loop waits for it. Outside
        of `steps` it acts at once, unless no update was made yet.
        """
        if self._micro_steps.is_idle or self.step == 0 or not self._is_due(self.config.training.save_every_steps):
            return None
        return self._save(scheduled=True)

    def validate(self) -> Sums:
        """Return (nats, ids, bytes) of one pass over all validation windows, summed in float64."""
        return total(self.validate_sources().values())

    def validate_sources(self, stop: Callable[[], bool] | None = None) -> dict[str, Sums]:
        """Return (nats, ids, bytes) for each source of the validation text, by name."""
        given = (self.engine, self.objective, self.validation_loader, self.config.seed, self._step.bytes_per_id)
        return validate(*given) if stop is None else validate(*given, stop)

    def close(self) -> None:
        """Finish pending writes, release the run directory and restore the signal handlers. Safe to call twice."""
        _release(*self._outlasting)

    # ------------------------------------------------------------------ parts of the loop

    def _begin(self) -> None:
        """Do what precedes the first step: evaluate, or finish the work that an interruption left undone."""
        self._begun = time.monotonic() - self.progress.seconds
        pending, self.progress.pending = self.progress.pending, []
        if "tasks" in pending or (self.step == 0 and self.config.evals.at_start):
            self._run_evals()
        if "validation" in pending:
            self._validate()
        if "checkpoint" in pending and self._is_due(self.config.training.save_every_steps):
            self._save(scheduled=True)

    def _finish(self) -> None:
        """Record, validate and save the last update of a loop without `steps`, whose own intervals may miss it."""
        self.log(self.step, self._loss)
        self._run_evals()
        self._validate()
        self._save(scheduled=True)
        self._saver.wait()

    def _check_requests(self) -> None:
        """Agree with the other ranks on the time and on requests to stop; on request, save and stop the program."""
        assert self._begun is not None
        elapsed = time.monotonic() - self._begun if self.distributed.rank == 0 else 0.0
        flags = [float(self.distributed.signals.reason() is not None), float(self._saver.writer.failed), elapsed]
        stop, failed, self.progress.seconds = self.distributed.sum_over_ranks(flags)
        if failed:
            self._saver.wait()
        if stop:
            self._end_on_request()

    def _end_on_request(self, *given_up: str) -> NoReturn:
        """Save, release the run directory and raise Stopped; without `steps`, exit with its code. `given_up`: work of
        this step that is still to be done."""
        why = f"stopped by {self.distributed.signals.reason() or 'a request to another rank'}"
        if self.step == 0:  # nothing is lost
            text = f"{why} before the first step"
        else:
            self._save(scheduled=False, pending=given_up)
            self._saver.wait()
            text = f"{why} at step {self.step} after saving"
        self.monitor.say(f"{text}; the same command {'continues' if self.step else 'begins'} it")
        self.close()
        raise Stopped(text) if self._in_steps else SystemExit(Stopped.exit_code)

    def _validate(self) -> float | None:
        training = self.config.training
        if not self._is_due(training.eval_every_steps):
            return None
        if self.progress.validation_bits_per_byte is not None:  # of these weights: once is enough
            return self.progress.validation_bits_per_byte
        started = time.perf_counter()
        try:
            by_source = self.validate_sources(self.distributed.agreed_stop())
        except Interrupted:
            self._end_on_request("validation", "checkpoint")
        whole = total(by_source.values())
        record = validation_record(self.step, by_source, time.perf_counter() - started)
        self.progress.validation_bits_per_byte = whole.bits_per_byte
        self._log(record, validation_line(record, training.max_steps, whole.bytes))
        return whole.bits_per_byte

    def _run_evals(self) -> None:
        """Evaluate by tasks every `evals.every_steps`, after the last step, and before the first one with
        `evals.at_start`. The first evaluation in a job prints its cost."""
        every = self.config.evals.every_steps
        if self._evaluate is None or every is None or not self._is_due(every) or self._evaluated_step == self.step:
            return
        started = time.perf_counter()
        interruptible = self.distributed.interruptible
        evaluate, weights = self._evaluate, interruptible.first(whole_weights(self.engine))
        answer = interruptible.run(lambda: evaluate(self.step, weights))
        if answer is None:
            self._end_on_request("tasks", "validation", "checkpoint")
        figures, text = answer
        seconds = time.perf_counter() - started
        self._log(
            {"step": self.step, "split": "evals", **figures, "timing": {"seconds": seconds}},
            f"step {self.step}/{self.config.training.max_steps}  {text}  (in {readable_time(seconds)})",
        )
        if self._evaluated_step is None and not self._is_finished():
            self.monitor.say(evals_cost_line(seconds, every, self.step, round((self.step + 1) / self._used_up())))
        self._evaluated_step = self.step

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Restore weights, moments and counters from a checkpoint of any number of ranks and any ZeRO stage."""
        self.progress = self._saver.restore(Path(path))
        self.recovery = Recovery(self.config.training.recovery, self.progress.recovery)

    def _save(self, scheduled: bool, pending: Iterable[str] = ()) -> Path:
        self.progress = self._saver.save(self.progress, self.recovery.state(), scheduled, pending)
        return checkpoint_path(self.run_dir, self.step)

    def _roll_back(self) -> None:
        """Go back to the weights of an older checkpoint. Raises NonFinite where there is none, except after a spike."""
        progress = self.recovery.roll_back(self._saver, self.step)
        if progress is not None:
            self.progress = progress
            self._log_recovery(self.recovery.rollback_line(self.step))
        elif not self._figures:
            text = self.recovery.advice(self.run_dir, self.step, self._saver.step)
            self.monitor.say(f"error: {text}")
            raise NonFinite(text)

    def _log_recovery(self, line: str) -> None:
        self._log({"step": self.step, "split": "recovery", **self.recovery.counts}, f"warning: {line}")

    def _log(self, record: dict[str, Any], line: str) -> None:
        def write() -> None:
            self.monitor.record(record)
            self.monitor.say(line)

        self.distributed.on_rank_zero(write)  # an error, such as a full disk, is raised on all ranks

    def _is_due(self, every: int) -> bool:
        return not self._in_steps or self.step % every == 0 or self._is_finished()

    def _used_up(self) -> float:
        return self.progress.used_up(self.config.training)

    def _is_finished(self) -> bool:
        return self.progress.is_finished(self.config.training)


def _release(writer: AsyncWriter, monitor: Monitor, distributed: Distributed, run: RunDirectory) -> None:
    """Finish pending writes, and release what outlasts the steps of a trainer."""
    try:
        writer.wait()
    except StlmError as error:  # the end of the loop waits before this; otherwise another error is being raised
        monitor.say(f"error: {error}")
    distributed.watchdog.stop()
    distributed.signals.restore()
    monitor.close()
    run.close()
