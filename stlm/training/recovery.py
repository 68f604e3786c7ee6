"""Recovery from losses that are not finite or spike: skip the step, roll back to a checkpoint, or stop.

A step whose loss or gradient is not finite is counted, but makes no update; the next step reads the next rows. After
too many of them in a row the weights are replaced by those of the last checkpoint. The step numbers do not go back, so
the rows that the lost weights had read are skipped. A loss spike that lasts is handled in the same way, as for PaLM
(Chowdhery et al. 2022, arXiv 2204.02311, section 5.1: restart from a checkpoint before the spike, and skip the batches
around it).

Each step therefore reads the same rows and has the same learning rate whatever happened before. All decisions depend
only on sums over all ranks, so ranks decide alike, and an interrupted run repeats its decisions.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.plurals import number_of
from stlm.checkpoints import checkpoints_of, step_of
from stlm.config.schema import RecoveryConfig
from stlm.training.deepspeed.engine import Engine
from stlm.training.run.checkpoint import check_checkpoint, is_scheduled
from stlm.training.run.progress import RunProgress
from stlm.training.run.saver import Saver


class Recovery:
    """Counter of skipped steps, loss spikes and rollbacks. `state`, from a checkpoint, restores an earlier one."""

    def __init__(self, config: RecoveryConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._config = config
        self._trouble = ""  # why the newest skipped step made no update
        self.skipped: int = state.get("skipped", 0)  # steps without an update, in the whole run
        self.rollbacks: int = state.get("rollbacks", 0)
        self.since: int | None = state.get("since")  # first step of what is wrong now
        self._skipped_in_a_row: int = state.get("skipped_in_a_row", 0)
        self._high_in_a_row: int = state.get("high_in_a_row", 0)
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=config.spike_window)

    def state(self) -> dict[str, Any]:
        """Return the state that the constructor accepts, as plain values for JSON."""
        return {
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "since": self.since,
            "skipped_in_a_row": self._skipped_in_a_row,
            "high_in_a_row": self._high_in_a_row,
            "losses": list(self._losses),
        }

    @property
    def may_roll_back(self) -> bool:
        """True while the run may roll back once more."""
        return self.rollbacks < self._config.max_rollbacks

    @property
    def counts(self) -> dict[str, int]:
        """Steps without an update and rollbacks so far, for the record."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks}

    def judge(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Record the outcome of `step`. Returns True if the run has to roll back to a checkpoint older than `since`.

        For a spike it returns True only while a rollback is allowed. For numbers that are not finite it always does,
        since the run cannot go on without a rollback.
        """
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        high = finite and self._is_high(loss)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        self._high_in_a_row = self._high_in_a_row + 1 if high else 0
        if finite and not high:
            self.since = None
            if self._config.spike_factor is not None:
                self._losses.append(loss)
            return False
        if self.since is None:
            self.since = step
        if high:
            return self._high_in_a_row % self._config.spike_steps == 0 and self.may_roll_back
        self.skipped += 1
        return self._skipped_in_a_row > self._config.max_skipped_in_a_row

    def skipped_line(self, step: int, loss: float, own_losses: Sequence[float], engine: Engine) -> str:
        """Return a line on a step that made no update: the loss or the gradient, and the rows that caused it, as far
        as they are known. `own_losses`: the loss of each micro-batch of this rank. All ranks call it.
        """
        what = "gradient" if math.isfinite(loss) else "loss"
        size, distributed = engine.split.micro_batch_size, engine.distributed
        flags = [0.0] * (distributed.world_size * len(own_losses))
        for index, value in enumerate(own_losses):
            flags[distributed.rank * len(own_losses) + index] = float(not math.isfinite(value))
        bad = [index for index, flag in enumerate(distributed.sum_over_ranks(flags)) if flag] or range(len(flags))
        rows = ", ".join(f"{i * size}-{(i + 1) * size - 1}" if size > 1 else str(i) for i in bad)
        self._trouble = f"the {what} of step {step} is not finite (rows {rows} of its batch)"
        return f"{self._trouble}; its update is left out"

    def roll_back(self, saver: Saver, step: int) -> RunProgress | None:
        """Restore the newest checkpoint from before the trouble; the step number does not go back.

        Returns the progress to go on with; None where no checkpoint is left, or the limit of rollbacks is reached. Only
        scheduled checkpoints are used, so an interrupted run rolls back to the same one as an uninterrupted run.
        """
        since = self.since
        assert since is not None

        def find() -> Path | None:
            older = (path for path in checkpoints_of(saver.run_dir) if step_of(path) < since)
            return next((path for path in older if check_checkpoint(path) is None and is_scheduled(path)), None)

        if not self.may_roll_back:
            return None
        found = saver.when_written(find)
        if found is None:
            return None
        progress = saver.restore(found, at_step=step)
        self.rolled_back(step_of(found))
        return replace(progress, step=step, pending=[], validation_bits_per_byte=None)

    def rolled_back(self, to_step: int) -> None:
        """Record a rollback. If the same trouble follows, the next rollback goes to an older checkpoint."""
        self.rollbacks += 1
        self.since = to_step
        self._skipped_in_a_row = self._high_in_a_row = 0

    def rollback_line(self, step: int) -> str:
        """Return a line on the newest rollback, after `step`."""
        return (
            f"going back to the weights of step {self.since}, and on with the data after step {step} "
            f"(rollback {self.rollbacks} of at most {self._config.max_rollbacks})"
        )

    def advice(self, run_dir: Path, step: int, saved_step: int) -> str:
        """Return the message that ends a run which cannot recover."""
        last_checkpoint = f"Last checkpoint: step {saved_step}" if saved_step else "No checkpoint was saved yet"
        skipped, went_back = number_of(self.skipped, "step"), number_of(self.rollbacks, "time")
        return (
            f"{self._trouble}; no update was made in {skipped}, and after going back {went_back} "
            f"nothing is left to try. {last_checkpoint}. Look at "
            f"the text: python scripts/describe.py {run_dir} --step {step}. A lower training.learning_rate or "
            "a longer warm-up may help"
        )

    def _is_high(self, loss: float) -> bool:
        if self._config.spike_factor is None or len(self._losses) < self._config.spike_window:
            return False
        return loss > self._config.spike_factor * statistics.median(self._losses)


def nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss, bit for bit. One that is not finite also gets a gradient that is not finite, so that no rank
    and no ZeRO stage makes an update."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
