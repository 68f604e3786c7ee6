"""Linear maps of several experts in one tensor.

Shape letters: G groups of S rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """E linear maps without bias. `weight` is [E, out, in]: ZeRO 3 gathers it once, whichever experts are chosen."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x_GSi: Tensor, experts: list[int]) -> Tensor:
        """Map each group by the expert listed for it: [G, S, in] → [G, S, out]."""
        weights = self.weight.unbind(0)
        return torch.stack([F.linear(x_Si, weights[e]) for x_Si, e in zip(x_GSi.unbind(0), experts, strict=True)])
