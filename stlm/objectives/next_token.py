"""Next-token prediction: each id given the ids before it."""

from __future__ import annotations

import torch
from torch import Tensor

from stlm.model import Output
from stlm.model.exits import ExitLogits
from stlm.objectives.base import Batch, Loss, Objective, nats_of_rows, register, z_loss


@register("next_token")
class NextToken(Objective):
    """Predict ids[:, t] from ids[:, :t]. The model shifts its inputs itself, so inputs and targets are the same ids."""

    def loss(self, output: Output, batch: Batch) -> Loss:
        terms = {} if output.exits is None else _exit_terms(output.exits, batch)
        if self.z_loss_weight:
            terms["z"] = self.z_loss_weight * z_loss(output.logits, batch)
        return Loss(nats_of_rows(output.logits, batch).sum(), terms)


def _exit_terms(exits: ExitLogits, batch: Batch) -> dict[str, Tensor]:
    """Return each exit's term of the loss, named by its depth: `exit_2` is the exit after the second layer.

    Each row is read at one exit only, so its loss is multiplied by the number of exits: in expectation, the terms are
    the weighted loss of all exits on all rows.
    """
    nats_B = nats_of_rows(exits.logits, batch) * len(exits.weights)
    return {
        f"exit_{depth}": weight * torch.where(exits.chosen == number, nats_B, 0.0).sum()
        for number, (depth, weight) in enumerate(exits.weights.items())
    }
