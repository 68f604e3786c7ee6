"""Cross-entropy of logits, in chunks of rows, so that no copy of all logits in fp32 is ever made.

Shape letters: B batch, T ids, V vocabulary, N = B * T.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 19  # logits: 2 MB in fp32, which stay in a core's cache


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, in nats, computed in fp32: [B, T]."""
    nats_N: Tensor = _CrossEntropy.apply(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return nats_N.view_as(targets_BT)


class _CrossEntropy(torch.autograd.Function):
    """The gradient is softmax - one_hot(target). Computing the softmax again costs less than keeping it in memory."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        nats_N = torch.empty(targets_N.shape, dtype=torch.float32, device=logits_NV.device)
        for rows in _chunks(logits_NV):
            log_softmax = torch.log_softmax(logits_NV[rows], -1, dtype=torch.float32)
            nats_N[rows] = -log_softmax.gather(1, targets_N[rows, None])[:, 0]
        return nats_N

    @staticmethod
    def backward(ctx: Any, weight_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N = ctx.saved_tensors
        gradient_NV = torch.empty_like(logits_NV)
        for rows in _chunks(logits_NV):
            part = torch.softmax(logits_NV[rows], -1, dtype=torch.float32).mul_(weight_N[rows, None])
            gradient_NV[rows] = part.scatter_add_(1, targets_N[rows, None], -weight_N[rows, None])
        return gradient_NV, None


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // logits_NV.size(1))
    for start in range(0, logits_NV.size(0), rows):
        yield slice(start, start + rows)
