"""Feed-forward layers, which transform each position by itself.

Shape letters: B batch, T positions, D width, F hidden width; G groups of S rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import GELUConfig, ReLUSquaredConfig, SwiGLUConfig
from stlm.config.model.core.feed_forward import PlainFeedForwardConfig
from stlm.model.context import Context
from stlm.model.registry import Registry


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


class FeedForward(nn.Module):
    """Interface of every feed-forward: [B, T, D] → [B, T, D].

    `down` is the last matrix; its output is added to the residual stream. Terms of the loss go to the context.
    """

    down: nn.Linear | ExpertLinear

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no forward()")


FEED_FORWARDS: Registry[FeedForward] = Registry("core.feed_forward")


@FEED_FORWARDS.register("swiglu")
class SwiGLU(FeedForward):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    down: nn.Linear

    def __init__(self, config: SwiGLUConfig, width: int) -> None:
        super().__init__()
        hidden_width = config.hidden_width_of(width)
        self.gate = nn.Linear(width, hidden_width, bias=config.bias)
        self.up = nn.Linear(width, hidden_width, bias=config.bias)
        self.down = nn.Linear(hidden_width, width, bias=config.bias)

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        return self.down(self.gated(self.gate(x_BTD), self.up(x_BTD)))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Compute the input of `down` from the outputs of `gate` and `up`: [..., F] each → [..., F]."""
        return F.silu(gate) * up

    def inner(self, gate_and_up: Tensor) -> Tensor:
        """Compute the same from their concatenation, as packed matrices return it: [..., 2F] → [..., F]."""
        return self.gated(*gate_and_up.chunk(2, dim=-1))


class PlainFeedForward(FeedForward):
    """Two matrices and an activation: down(inner(up(x))) (Vaswani et al. 2017, arXiv 1706.03762, section 3.3)."""

    down: nn.Linear

    def __init__(self, config: PlainFeedForwardConfig, width: int) -> None:
        super().__init__()
        hidden_width = config.hidden_width_of(width)
        self.up = nn.Linear(width, hidden_width, bias=config.bias)
        self.down = nn.Linear(hidden_width, width, bias=config.bias)

    def inner(self, up: Tensor) -> Tensor:
        """Apply the activation to each number of the output of `up`; `down` reads the result."""
        raise TypeError(f"{type(self).__name__} defines no inner()")

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        return self.down(self.inner(self.up(x_BTD)))


@FEED_FORWARDS.register("gelu")
class GELU(PlainFeedForward):
    """GELU: x * Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""

    def __init__(self, config: GELUConfig, width: int) -> None:
        super().__init__(config, width)
        self.approximation = "tanh" if config.approximate else "none"

    def inner(self, up: Tensor) -> Tensor:
        return F.gelu(up, approximate=self.approximation)


@FEED_FORWARDS.register("relu_squared")
class ReLUSquared(PlainFeedForward):
    """Squared ReLU: max(x, 0)^2 (Primer: So et al. 2021, arXiv 2109.08668, section 4)."""

    def __init__(self, config: ReLUSquaredConfig, width: int) -> None:
        super().__init__(config, width)

    def inner(self, up: Tensor) -> Tensor:
        return torch.relu(up).square()
