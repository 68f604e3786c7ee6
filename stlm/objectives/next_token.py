"""Next-token prediction: every id given the ids before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm.objectives.base import Batch, Prepared, Sums
from stlm.stlm import Output


class NextToken:
    """Predict ids[:, t] from ids[:, :t]. The model shifts its inputs itself, so inputs and targets are the same ids.

    With a `z_loss_weight`, the logits of each counted id pay for log(Z)^2 as well, Z being what the softmax divides by:
    they stay close to log-probabilities, and do not drift (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """

    def __init__(self, z_loss_weight: float = 0.0) -> None:
        self.z_loss_weight = z_loss_weight

    def prepare(self, batch: Batch, seed: int, step: int, row: int) -> Prepared:
        return Prepared(batch.ids, batch.ids, batch.loss_mask, batch.document_ids)

    def sums(self, output: Output, prepared: Prepared, bytes_per_id: Tensor) -> Sums:
        """Cross-entropy of each counted id in fp32, added up in float64. The z-loss goes to the auxiliary terms."""
        logits_NV = output.logits.float().flatten(0, 1)
        nats_N = F.cross_entropy(logits_NV, prepared.targets.flatten(), reduction="none")
        counted_N = prepared.loss_mask.flatten()
        if self.z_loss_weight:
            log_divisors = logits_NV[counted_N].logsumexp(-1)
            output.auxiliary["z"] = self.z_loss_weight * log_divisors.square().double().sum()
        return Sums(
            nats=torch.where(counted_N, nats_N, 0.0).double().sum(),
            ids=counted_N.sum(),
            bytes=(bytes_per_id[prepared.targets] * prepared.loss_mask).sum(),
        )
