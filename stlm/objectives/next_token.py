"""Next-token prediction: each id given the ids before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm.model import Output
from stlm.model.exits import ExitLogits
from stlm.objectives.base import Batch, Prepared, Sums


class NextToken:
    """Predict ids[:, t] from ids[:, :t]. The model shifts its inputs itself, so inputs and targets are the same ids.

    A `z_loss_weight` adds that weight times log(Z)^2 for each counted id, Z being the divisor of the softmax: it keeps
    logits close to log-probabilities (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """

    def __init__(self, z_loss_weight: float = 0.0) -> None:
        self.z_loss_weight = z_loss_weight

    def prepare(self, batch: Batch, seed: int, step: int, row: int) -> Prepared:
        return Prepared(batch.ids, batch.ids, batch.loss_mask, batch.document_ids)

    def sums(self, output: Output, prepared: Prepared, bytes_per_id: Tensor) -> Sums:
        """Sum the cross-entropy of counted ids, computed in fp32, in float64. The losses of exits and the z-loss are
        added to the auxiliary terms."""
        if output.exits is not None:
            output.auxiliary.update(_exit_terms(output.exits, prepared))
        if self.z_loss_weight:
            log_divisors = output.logits[prepared.loss_mask].float().logsumexp(-1)
            output.auxiliary["z"] = self.z_loss_weight * log_divisors.square().double().sum()
        return Sums(
            nats=_nats(output.logits, prepared).sum(),
            ids=prepared.loss_mask.sum(),
            bytes=(bytes_per_id[prepared.targets] * prepared.loss_mask).sum(),
        )


def _nats(logits_BTV: Tensor, prepared: Prepared) -> Tensor:
    """Return the summed cross-entropy of each row's counted ids: float64 [B]."""
    nats_N = F.cross_entropy(logits_BTV.float().flatten(0, 1), prepared.targets.flatten(), reduction="none")
    return torch.where(prepared.loss_mask, nats_N.view_as(prepared.targets), 0.0).double().sum(1)


def _exit_terms(exits: ExitLogits, prepared: Prepared) -> dict[str, Tensor]:
    """Return each exit's term of the loss, named by its depth: `exit_2` is the exit after the second layer.

    Each row is read at one exit only, so its loss is multiplied by the number of exits: in expectation, the terms are
    the weighted loss of all exits on all rows.
    """
    nats_B = _nats(exits.logits, prepared) * len(exits.weights)
    return {
        f"exit_{depth}": weight * torch.where(exits.chosen == number, nats_B, 0.0).sum()
        for number, (depth, weight) in enumerate(exits.weights.items())
    }
