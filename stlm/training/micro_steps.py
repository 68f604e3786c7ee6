"""Micro-steps: the steps of a training loop without `Trainer.steps`, counted from 0 at every start of the program.

The update is made at the last of its `accumulation` micro-steps. Micro-steps of updates that an earlier job made do
nothing, nor do those after the end of the run.
"""

from __future__ import annotations


class MicroSteps:
    """Position in the loop. `resumed_step`: updates of earlier jobs; `accumulation`: micro-steps of an update."""

    def __init__(self, resumed_step: int, accumulation: int) -> None:
        self._resumed_step = resumed_step
        self._accumulation = accumulation
        self.is_idle = False  # whether the newest micro-step does nothing

    def reaches(self, micro_step: int, updates: int) -> bool:
        """Return True if the last of the `updates` made so far, or a later one, belongs to this micro-step."""
        return micro_step // self._accumulation >= updates - 1

    def advance(self, micro_step: int, updates: int, is_finished: bool) -> bool:
        """Move to a micro-step, when `updates` were made; return True if it completes the next one.

        `is_finished`: no update is left. Raises ValueError where micro-steps were left out.
        """
        before, part = divmod(micro_step, self._accumulation)  # updates and micro-steps before it
        is_over = is_finished and before >= updates
        if before > updates and not is_over:
            raise ValueError(f"the next step is {updates * self._accumulation}, got {micro_step}")
        self.is_idle = is_over or before < self._resumed_step
        return not is_over and before == updates and part + 1 == self._accumulation
