"""Settings for recovery from losses that are not finite or spike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.yaml.fields import Conflict, setting


@dataclass(frozen=True)
class RecoveryConfig:
    """Skipped steps and rollbacks to a checkpoint. None of it affects a run without such losses."""

    max_skipped_in_a_row: int = setting(
        3,
        "steps in a row that may pass without an update because loss or gradient is not finite; one more leads back to "
        "the last scheduled checkpoint",
        minimum=0,
        may_change=True,
    )
    max_rollbacks: int = setting(
        2, "returns to a checkpoint in a run; where none is left, it stops", minimum=0, may_change=True
    )
    spike_factor: float | None = setting(
        None,
        "a loss above so many times the median of the last spike_window losses counts as a spike (1.5 is much); null: "
        "none does",
        above=1.0,
        may_change=True,
    )
    spike_steps: int = setting(
        10, "steps in a row that a spike lasts before the run goes back to a checkpoint", minimum=1, may_change=True,
        needs=("spike_factor", 1.5),
    )  # fmt: skip
    spike_window: int = setting(
        100, "losses whose median a spike is measured by; before there are so many, none is one", minimum=1,
        may_change=True, needs=("spike_factor", 1.5),
    )  # fmt: skip

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between these settings."""
        if self.spike_factor is not None and self.max_rollbacks == 0:
            yield Conflict(
                "spike_factor",
                f"got {self.spike_factor:g}, which has no effect with training.recovery.max_rollbacks = 0, as a spike "
                "is answered by a return to a checkpoint; expected null, or training.recovery.max_rollbacks=2",
                ("max_rollbacks",),
                idle=True,
            )
