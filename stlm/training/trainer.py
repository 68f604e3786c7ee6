"""The Trainer of the short loop:

    for step in trainer.steps():
        loss = trainer.train_step(step)
        trainer.log(step, loss)
        trainer.val_step()
        trainer.save_checkpoint(step)

Steps are numbered from 1: "at step s" means after the s-th update. `log`, `val_step` and `save_checkpoint` act only
when they are due, and at the last step. Every method is called by all ranks.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from stlm.config import RunConfig
from stlm.config.build import to_dict
from stlm.errors import ConfigError, StlmError, Stopped
from stlm.objectives import build_objective
from stlm.stlm import STLM, checkpoints_of, step_of
from stlm.training.agreement import fingerprints, refuse_differences
from stlm.training.background import Background
from stlm.training.checkpoint import (
    check_checkpoint,
    checkpoint_path,
    prune_checkpoints,
    read_progress,
    read_state,
    refuse_other_model,
    write_checkpoint,
)
from stlm.training.collectives import on_every_rank, on_rank_zero, sum_over_ranks, watch_for_hangs
from stlm.training.engine import Engine, State, connect
from stlm.training.entropy import begin_entropy_patching
from stlm.training.faults import NonFinite, StopRequest
from stlm.training.gauges import Gauges
from stlm.training.initial import begin_from
from stlm.training.limits import used_up
from stlm.training.loaders import TrainingBatches, ValidationWindows
from stlm.training.loss_scale import LossScale
from stlm.training.monitor import Monitor, progress_line, readable_time
from stlm.training.passes import Passes
from stlm.training.precision import Precision, choose_precision
from stlm.training.quantization import check_stage
from stlm.training.recovery import Recovery
from stlm.training.run_directory import RunDirectory, Start
from stlm.training.schedules import learning_rate_at
from stlm.training.stopwatch import STOPWATCH
from stlm.training.wandb_mirror import check_wandb
from stlm.training.watchdog import WATCHDOG, watched

RESUME = ("auto", "never", "must")

# What is asked of the model beside its training: (step, weights by name) → figures for the record, a line for people.
Evaluate = Callable[[int, Iterable[tuple[str, torch.Tensor]]], tuple[dict[str, Any], str]]


class Trainer:
    """Trains one model into one run directory, from its newest checkpoint on.

    Without a `deepspeed_config` the engine runs at ZeRO stage 0. `resume`: "auto" continues what the directory holds,
    "must" refuses to begin anew, "never" refuses to continue. `evaluate` is called by all ranks every
    `evals.every_steps`, with weights that belong to the engine and are there to be copied. Raises ConfigError or
    CheckpointError where the run cannot begin or go on as asked.
    """

    def __init__(
        self,
        config: RunConfig,
        model: STLM,
        optimizer: torch.optim.Optimizer,
        train_loader: TrainingBatches,
        validation_loader: ValidationWindows,
        *,
        run_dir: str | os.PathLike[str],
        deepspeed_config: Mapping[str, Any] | None = None,
        resume: str = "auto",
        evaluate: Evaluate | None = None,
    ) -> None:
        if resume not in RESUME:
            raise ConfigError(f"resume: got {resume!r}, expected one of {', '.join(RESUME)}")
        self.config = config
        self.model = model
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self._evaluate = evaluate
        self.objective = build_objective(config.training.objective, config.training.z_loss_weight)
        self.step = 0  # updates made
        self.seen = {"ids": 0, "bytes": 0}
        self.seconds = 0.0  # of training before the newest step, as all ranks have them
        self.recovery = Recovery(config.training.recovery)
        self.validation_bits_per_byte: float | None = None  # of the newest validation

        self.ranks = connect()
        self.run_dir = Path(run_dir)
        self._run = RunDirectory(run_dir)
        refuse_differences(fingerprints(config, deepspeed_config, train_loader.fingerprint))
        if config.training.wandb:
            on_rank_zero(check_wandb)
        opened = on_rank_zero(lambda: self._run.open(config, train_loader.fingerprint, resume)._asdict())
        start = Start(**opened)
        on_every_rank(self._run.check_shared)
        chosen = on_rank_zero(lambda: choose_precision(config.training.precision, deepspeed_config)._asdict())
        precision = Precision(**chosen)
        self.step = read_progress(start.checkpoint)["step"] if start.checkpoint else 0
        self.monitor = Monitor(self.run_dir)
        wandb_config = to_dict(config) if config.training.wandb else None
        on_rank_zero(lambda: self.monitor.open(self.step + 1, wandb_config))
        for note in start.notes:
            self.monitor.say(f"warning: {note}")
        if start.checkpoint is None:
            if begun := begin_from(model, config.training):
                self.monitor.say(begun)
            for note in begin_entropy_patching(model, train_loader, config.training.batch_size):
                self.monitor.say(note)

        self.engine = Engine(
            model, optimizer, config.training, precision, deepspeed_config or {"zero_optimization": {"stage": 0}}
        )
        check_stage(config.training, self.engine.stage)
        self.monitor.say(f"{self.ranks}; ZeRO stage {self.engine.stage}; {precision.name}: {precision.reason}")
        learns_whole = all(parameter.requires_grad for parameter in model.parameters())
        self._gauges = Gauges(self.engine.device, precision.name, learns_whole)
        self.monitor.say(self._gauges.told)
        self._passes = Passes(config, model, self.engine, self.objective, self._gauges)
        if start.checkpoint is not None:
            self.load_checkpoint(start.checkpoint)
            finished = ", which is its last step" if self._is_finished() else ""
            self.monitor.say(f"continuing from {start.checkpoint}{finished}")
        on_rank_zero(lambda: self._run.record_start(self.step, self._environment()))
        stacks = on_rank_zero(lambda: self.run_dir / "stacks" / time.strftime("%Y-%m-%d_%H-%M-%S"))
        watch_for_hangs(stacks, config.training.hang_timeout_s)
        self._saved_step = self.step
        self._copied: State | None = None  # for the newest checkpoint, and then the room for the next
        self._writer = Background()  # of checkpoints, on rank 0
        self._validated_step: int | None = None
        self._last: dict[str, float] = {}  # figures of the newest step; empty if it made no update
        self._trouble = ""  # what was wrong with the newest step that made none
        self._stop = StopRequest()

    # ------------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps that are still to be made.

        Between two steps the ranks agree whether one of them was asked to stop, by SIGINT, SIGTERM, SIGUSR1, SIGHUP or
        the end of its launcher; then a checkpoint is saved and Stopped is raised. So is the error of a checkpoint that
        could not be written beside the steps. At the end the last checkpoint is on the disk; however the end comes, the
        run directory is released.
        """
        started = time.monotonic() - self.seconds
        finished = self._is_finished()
        try:
            if self.step == 0:
                self._ask()
            while not finished:
                yield self.step + 1
                finished = self._is_finished()
                asked = self._stop.reason()
                flags = [float(asked is not None), float(self._writer.failed)]
                flags.append(time.monotonic() - started if self.ranks.rank == 0 else 0.0)
                stop, failed, self.seconds = (0.0, 0.0, self.seconds) if finished else sum_over_ranks(flags)
                if failed:
                    on_rank_zero(self._writer.wait)
                if stop:
                    self._save()
                    on_rank_zero(self._writer.wait)
                    text = f"stopped by {asked or 'a request to another rank'} at step {self.step} after saving"
                    self.monitor.say(f"{text}; the same command continues it")
                    raise Stopped(text)
            on_rank_zero(self._writer.wait)
        finally:
            self.close()

    @watched("a training step")
    def train_step(self, step: int) -> float:
        """Make update `step`, which is the next. Returns the loss before it, in nats per id over the whole batch.

        Where that or the gradient is not finite, no update is made; see recovery.py for what follows. Raises NonFinite
        where nothing is left to be done; the model is unchanged then.
        """
        if step != self.step + 1:
            raise ValueError(f"the next step is {self.step + 1}, got {step}")
        with self._gauges.step():
            loss, go_back = self._update(step)
        if go_back:
            self._roll_back()
        return loss

    def _update(self, step: int) -> tuple[float, bool]:
        """The step itself. Returns its loss, and whether the run has to go back to a checkpoint."""
        with STOPWATCH.phase("data"):
            micro_batches = self._passes.read(self.train_loader, step, self.ranks)
            predicted = float(sum(prepared.loss_mask.sum() for prepared in micro_batches))
        (ids,) = sum_over_ranks([predicted])
        terms, measures, local = self._passes.gradient(micro_batches, ids, self._used_up())
        nats, bytes, *rest = sum_over_ranks([math.fsum(column) for column in zip(*local, strict=True)])
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
            counted = 2 + len(terms)
            self._tell_skipped(whole_loss, [math.fsum((row[0], *row[2:counted])) for row in local])
        self._gauges.add(bytes)
        return loss_value, go_back

    def log(self, step: int, loss: float) -> None:
        """Record the step that was just made: every `log_every_steps`, and the first and the last one.

        One that made no update has told so by itself.
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
        """Validate every `eval_every_steps`, and at the last step. Returns bits per byte if it was done.

        What else is asked of the model every `evals.every_steps` is asked here too.
        """
        self._ask()
        if not self._due(self.config.training.eval_every_steps):
            return None
        started = time.perf_counter()
        by_source = self.validate_sources()
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
            f"step {self.step}/{self.config.training.max_steps}  validation {self.validation_bits_per_byte:.4f} "
            f"bits/byte  ({bytes:,.0f} bytes in {readable_time(seconds)})"
            + "".join(f"\n  {value:.4f} bits/byte  {name}" for name, value in parts.items() if len(by_source) > 1),
        )
        return self.validation_bits_per_byte

    def save_checkpoint(self, step: int) -> Path | None:
        """Save every `save_every_steps`, and at the last step. Returns where, if it was due.

        The state is copied at once, and written to the disk beside the next steps; the loop's end waits for it.
        """
        return self._save() if self._due(self.config.training.save_every_steps) else None

    # ------------------------------------------------------------------ what the loop is made of

    def validate(self) -> tuple[float, float, float]:
        """(nats, ids, bytes) of one pass over all validation windows, summed in float64."""
        nats, ids, bytes = (math.fsum(column) for column in zip(*self.validate_sources().values(), strict=True))
        return nats, ids, bytes

    def validate_sources(self) -> dict[str, tuple[float, float, float]]:
        """(nats, ids, bytes) for each source of the validation text, by its name."""
        return self._passes.validate(self.validation_loader, self.ranks)

    def _ask(self) -> None:
        """Let `evaluate` ask its tasks: every `evals.every_steps`, before the first step and behind the last."""
        every = self.config.evals.every_steps
        if self._evaluate is None or every is None or not self._due(every):
            return
        started = time.perf_counter()
        figures, text = self._evaluate(self.step, self.engine.weights())
        seconds = time.perf_counter() - started
        self._tell(
            {"step": self.step, "split": "evals", **figures, "timing": {"seconds": seconds}},
            f"step {self.step}/{self.config.training.max_steps}  {text}  (in {readable_time(seconds)})",
        )

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Set weights, moments and counters to those of a checkpoint, which may come from any ranks and ZeRO stage."""
        path = Path(path)
        refuse_other_model(path, self.config.model, self.model.tokenizer)
        context = self.config.model.context_length
        example = torch.zeros(1, context, dtype=torch.long, device=self.engine.device)
        self.engine.load_state(read_state(path), [example])
        progress = read_progress(path)
        self.step = progress["step"]
        self.seen = {"ids": progress["ids_seen"], "bytes": progress["bytes_seen"]}
        self.seconds = progress.get("seconds") or 0.0
        if self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(**progress.get("loss_scale") or {})
        self.recovery = Recovery(self.config.training.recovery, progress.get("recovery"))

    def close(self) -> None:
        """Finish what is being written, release the run directory and give the signals back. Twice does nothing."""
        try:
            self._writer.wait()
        except StlmError as error:  # where it is not the end of the loop that waits, something else is being raised
            self.monitor.say(f"error: {error}")
        WATCHDOG.stop()
        self._stop.restore()
        self.monitor.close()
        self._run.close()

    def _save(self) -> Path:
        path = checkpoint_path(self.run_dir, self.step)
        if self._saved_step == self.step:
            return path
        on_rank_zero(self._writer.wait)  # before another copy of the state is made
        state = self._copied = self.engine.full_state(reused=self._copied)
        progress = {
            "step": self.step,
            "ids_seen": self.seen["ids"],
            "bytes_seen": self.seen["bytes"],
            "seconds": self.seconds if self.config.training.limits.wall_time_s else None,  # nobody else asks for it
            "sequences_seen": self.step * self.config.training.batch_size,
            "seed": self.config.seed,  # with the step, all randomness there is
            "loss_scale": None if self.engine.loss_scale is None else self.engine.loss_scale._asdict(),
            "recovery": self.recovery.state(),
            "data_fingerprint": self.train_loader.fingerprint,
            "tokenizer_fingerprint": self.model.tokenizer.fingerprint,
            "validation_bits_per_byte": self.validation_bits_per_byte if self._validated_step == self.step else None,
        }

        def write() -> None:
            write_checkpoint(path, self.config.model, self.model.tokenizer, state, progress)
            prune_checkpoints(self.run_dir, self.config.training)

        on_rank_zero(lambda: self._writer.start(write))
        self._saved_step = self.step
        return path

    def _tell(self, record: dict[str, Any], line: str) -> None:
        def tell() -> None:
            self.monitor.record(record)
            self.monitor.say(line)

        on_rank_zero(tell)  # where the disk is full, all ranks learn of it

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self._is_finished()

    def _used_up(self) -> float:
        return used_up(self.config.training, self.step, self.seen["ids"], self.seen["bytes"], self.seconds)

    def _is_finished(self) -> bool:
        return self._used_up() > 1

    def _tell_skipped(self, loss: float, nats: list[float]) -> None:
        """Say which step made no update, and which rows of its batch brought it about, as far as they can be told.

        nats: the loss of each micro-batch of this rank.
        """
        self._last = {}
        what = "gradient" if math.isfinite(loss) else "loss"
        size, total = self.engine.split.micro_batch_size, self.config.training.batch_size
        flags = [0.0] * (total // size)
        for index, value in enumerate(nats):
            flags[self.ranks.rank * self.engine.split.accumulation + index] = float(not math.isfinite(value))
        bad = [index for index, flag in enumerate(sum_over_ranks(flags)) if flag] or range(len(flags))
        rows = ", ".join(f"{i * size}-{(i + 1) * size - 1}" if size > 1 else str(i) for i in bad)
        self._trouble = f"the {what} of step {self.step} is not finite (rows {rows} of its batch)"
        self._tell_recovery(f"{self._trouble}; its update is left out")

    def _roll_back(self) -> None:
        """Put the weights of an older checkpoint in the place of those that went wrong; the step's number stays.

        Raises NonFinite where there is none, or too many were needed, unless it was but a spike of the loss.
        """
        since, step, recovery = self.recovery.since, self.step, self.recovery
        assert since is not None

        def find() -> Path | None:
            self._writer.wait()
            older = (path for path in checkpoints_of(self.run_dir) if step_of(path) < since)
            return next((path for path in older if check_checkpoint(path) is None), None)

        found = on_rank_zero(find) if recovery.may_roll_back else None
        if found is not None:
            self.load_checkpoint(found)
            recovery.rolled_back(self.step)
            self.step, self.recovery = step, recovery
            self._tell_recovery(
                f"going back to the weights of step {step_of(found)} and on with the data behind step {step} "
                f"(time {recovery.rollbacks} of at most {self.config.training.recovery.max_rollbacks})"
            )
        elif not self._last:
            text = (
                f"{self._trouble}; no update was made in {recovery.skipped} steps, and after going back "
                f"{recovery.rollbacks} times nothing is left to try. Last checkpoint: step {self._saved_step}. Look at "
                f"the text: python scripts/describe.py {self.run_dir} --step {step}. A lower training.learning_rate or "
                "a longer warm-up may help"
            )
            self.monitor.say(f"error: {text}")
            raise NonFinite(text)

    def _tell_recovery(self, line: str) -> None:
        counts = {"skipped": self.recovery.skipped, "rollbacks": self.recovery.rollbacks}
        self._tell({"step": self.step, "split": "recovery", **counts}, f"warning: {line}")

    def _environment(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks.world_size,
            "launcher": self.ranks.source,
            "device": str(self.engine.device),
            "threads": torch.get_num_threads(),
            "precision": self.engine.precision._asdict(),
            "deepspeed_config": self.engine.config,
        }
