"""Next-token prediction: every id given the ids before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm.objectives.base import Batch, Prepared, Sums
from stlm.stlm import Output


class NextToken:
    """Predict ids[:, t] from ids[:, :t]. The model shifts its inputs itself, so inputs and targets are the same ids."""

    def prepare(self, batch: Batch, seed: int, step: int, row: int) -> Prepared:
        return Prepared(batch.ids, batch.ids, batch.loss_mask, batch.document_ids)

    def sums(self, output: Output, prepared: Prepared, bytes_per_id: Tensor) -> Sums:
        """Cross-entropy of each counted id in fp32, added up in float64."""
        logits_NV = output.logits.float().flatten(0, 1)
        nats_N = F.cross_entropy(logits_NV, prepared.targets.flatten(), reduction="none")
        counted_N = prepared.loss_mask.flatten()
        return Sums(
            nats=torch.where(counted_N, nats_N, 0.0).double().sum(),
            ids=counted_N.sum(),
            bytes=(bytes_per_id[prepared.targets] * prepared.loss_mask).sum(),
        )
