"""Normalization of vectors, RMSNorm and LayerNorm, and soft caps of numbers."""

from __future__ import annotations

from typing import Any

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
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # compilers fuse torch's own operations
        if eager and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return y
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in fp32 with its gradient written out: [..., D], weight [D] → [..., D].

    On CPUs, torch runs RMSNorm and its gradient as some 20 operations, each of which reads or writes whole tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        product_RD = (x * dy).flatten(0, -2)
        dweight_D = product_RD.mT.mv(scale.flatten())
        along = product_RD.mv(weight_D).view_as(scale).mul_(scale.pow(3)).div_(-x.size(-1))
        return (dy * weight_D).mul_(scale).addcmul_(x, along), dweight_D, None


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
