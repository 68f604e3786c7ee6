"""What becomes of a step whose numbers are wrong: it is skipped, the run goes back to a checkpoint, or it stops.

A loss or gradient that is not finite changes nothing: the step is counted, its update is left out, and the next one has
the next rows. After too many in a row the weights are to blame, and those of the last checkpoint take their place; the
steps since then keep their numbers and their rows, so what the lost weights had read is passed over. A spike of the
loss, which does not go away by itself, is answered in the same way, as PaLM was trained (Chowdhery et al. 2022, arXiv
2204.02311, section 5.1: back to a checkpoint before the spike, and past the batches around it).

A step therefore reads the same rows whatever has happened, the schedule goes on, and everything is decided from sums
that all ranks have: they decide alike, and a run that was interrupted decides again as it did before.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stlm.config.recovery import RecoveryConfig


class Recovery:
    """Counts what went wrong. `state`, from a checkpoint, makes it go on where another one was."""

    def __init__(self, config: RecoveryConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._config = config
        self.skipped: int = state.get("skipped", 0)  # steps without an update, in the whole run
        self.rollbacks: int = state.get("rollbacks", 0)
        self.since: int | None = state.get("since")  # first step of what is wrong now
        self._skipped_in_a_row: int = state.get("skipped_in_a_row", 0)
        self._high_in_a_row: int = state.get("high_in_a_row", 0)
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=config.spike_window)

    def state(self) -> dict[str, Any]:
        """What the constructor takes, for JSON."""
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
        """Whether the run may go back to a checkpoint once more."""
        return self.rollbacks < self._config.max_rollbacks

    def judge(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Note how `step` went. True if the run has to go back to a checkpoint that is older than step `since`.

        For a spike that is asked only while it may; where numbers are not finite, going on without it makes no sense.
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

    def rolled_back(self, to_step: int) -> None:
        """Note a return to a checkpoint. Should it not help, the next one goes to an older one."""
        self.rollbacks += 1
        self.since = to_step
        self._skipped_in_a_row = self._high_in_a_row = 0

    def _is_high(self, loss: float) -> bool:
        if self._config.spike_factor is None or len(self._losses) < self._config.spike_window:
            return False
        return loss > self._config.spike_factor * statistics.median(self._losses)


def spoilt_unless_finite(loss: Tensor) -> Tensor:
    """The loss itself, to the last bit; one that is not finite gets a gradient that is not finite either, so that no
    rank and no ZeRO stage makes an update of it."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
