"""Training objectives, one a file. Each returns sums, and the trainer divides once."""

import importlib

from stlm.config import TrainingConfig
from stlm.objectives.base import OBJECTIVES, Batch, Loss, Objective


def build_objective(training: TrainingConfig) -> Objective:
    """Return the objective that `training.objective` selects, with its settings."""
    importlib.import_module(f"{__name__}.{training.objective.kind}")  # registers it
    return OBJECTIVES[training.objective.kind](training.objective, training.z_loss_weight)


__all__ = ["Batch", "Loss", "Objective", "build_objective"]
