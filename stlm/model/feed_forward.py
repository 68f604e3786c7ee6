"""Feed-forwards: what a layer does to each position on its own.

Shape letters: B batch, T positions, D width, F width inside.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import SwiGLUConfig
from stlm.model.registry import Registry


class FeedForward(nn.Module):
    """Interface of every feed-forward: [B, T, D] → [B, T, D]."""

    def lasts(self) -> list[nn.Linear]:
        """The matrices whose products are added to the residual stream: their initial values shrink with depth."""
        raise TypeError(f"{type(self).__name__} defines no lasts()")

    def forward(self, x_BTD: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no forward()")


FEED_FORWARDS: Registry[FeedForward] = Registry("core.feed_forward")


@FEED_FORWARDS.register("swiglu")
class SwiGLU(FeedForward):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: SwiGLUConfig, width: int) -> None:
        super().__init__()
        hidden_width = config.hidden_width or default_gated_width(width)
        self.gate = nn.Linear(width, hidden_width, bias=False)
        self.up = nn.Linear(width, hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def lasts(self) -> list[nn.Linear]:
        return [self.down]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


def default_gated_width(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 32: three matrices then have the parameters of two of 4x."""
    return -(-8 * width // (3 * 32)) * 32
