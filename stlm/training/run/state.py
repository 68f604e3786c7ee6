"""State of a run's weights and optimizer, as checkpoints hold it: by parameter name, whole, in fp32, on the CPU."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """Parameters and optimizer state, by parameter name, in fp32 on the CPU."""

    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]  # "exp_avg", … → parameter name → tensor
    updates: int  # made so far; Adam's bias correction depends on it
