"""Linear maps of several experts in one tensor.

Shape letters: G groups of S rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """E linear maps without bias. `weight` is [E, out, in]: under ZeRO 3 it is gathered once, whoever is chosen."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x_GSi: Tensor, experts: list[int]) -> Tensor:
        """[G, S, in] → [G, S, out], each group through the expert that is named for it."""
        weights = self.weight.unbind(0)
        return torch.stack([F.linear(x_Si, weights[e]) for x_Si, e in zip(x_GSi.unbind(0), experts, strict=True)])
