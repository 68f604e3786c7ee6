"""Loss scaling for fp16: gradients below 6e-8 would be lost, so the loss is multiplied before backward."""

from __future__ import annotations

from typing import NamedTuple


class LossScale(NamedTuple):
    """Dynamic loss scale (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

    The scale doubles after `GROWTH_STEPS` updates in a row. Where a gradient overflows, the step is skipped and the
    scale halved. As the scale keeps growing, an occasional overflow is normal and no error.
    """

    value: float = 2.0**16  # a power of two: multiplying and dividing by it changes no bit
    updates_in_a_row: int = 0
    overflowed_steps: int = 0

    def after(self, overflow: bool) -> LossScale:
        """Return the scale of the next step."""
        if overflow:
            return LossScale(max(self.value / 2, 1.0), 0, self.overflowed_steps + 1)
        if self.updates_in_a_row + 1 == GROWTH_STEPS:
            return LossScale(min(self.value * 2, 2.0**24), 0, self.overflowed_steps)
        return self._replace(updates_in_a_row=self.updates_in_a_row + 1)


GROWTH_STEPS = 2000
