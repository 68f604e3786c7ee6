"""Normalization of vectors, RMSNorm and LayerNorm, and soft caps of numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import LayerNormConfig, RMSNormConfig
from stlm.model.registry import Registry


class Norm(nn.Module):
    """Interface of every norm: [..., D] → [..., D], over the last dimension. `weight` begins at 1, `bias` at 0."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no forward()")


NORMS: Registry[Norm] = Registry("core.norm")


@NORMS.register("rms_norm")
class RMSNorm(Norm):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, config: RMSNormConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


@NORMS.register("layer_norm")
class LayerNorm(Norm):
    """LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, config: LayerNormConfig, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.bias else None
        self.eps = config.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.size(-1),), self.weight, self.bias, self.eps)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(x / cap): close to x where x is small, within ± cap (Gemma 2, arXiv 2408.00118, section 2).

    Without a cap, return x.
    """
    return x if cap is None else cap * torch.tanh(x / cap)
