"""Scaling of a layer's branches, attention and feed-forward, before they are added to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stlm.config import ResidualConfig


class BranchScale(nn.Module):
    """Factor of a branch's output: [..., D] → [..., D].

    A learned one is a vector that begins at the factor (LayerScale: Touvron et al. 2021, arXiv 2103.17239, section 2).
    """

    def __init__(self, config: ResidualConfig, width: int) -> None:
        super().__init__()
        self.scale = config.scale
        self.weight = nn.Parameter(torch.full((width,), config.scale)) if config.learned_scale else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return x * self.weight
        return x if self.scale == 1.0 else x * self.scale
