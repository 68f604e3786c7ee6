"""Training objectives, one a file. Each returns sums, and the trainer divides once."""

from stlm.objectives.base import Batch, Objective, Prepared, Sums
from stlm.objectives.next_token import NextToken

OBJECTIVES: dict[str, type[Objective]] = {"next_token": NextToken}


def build_objective(name: str, z_loss_weight: float = 0.0) -> Objective:
    """Return the objective that `training.objective` names."""
    return OBJECTIVES[name](z_loss_weight)


__all__ = ["OBJECTIVES", "Batch", "NextToken", "Objective", "Prepared", "Sums", "build_objective"]
