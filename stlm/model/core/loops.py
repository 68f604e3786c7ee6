"""Depth recurrence: layers that are run several times."""

from __future__ import annotations

from torch import Tensor, nn

from stlm.config import LoopsConfig


class LoopEmbeddings(nn.Embedding):
    """One vector for each pass of a loop, added to [B, T, D] where the pass begins; initialized to zero.

    It marks the pass for the layers (Universal Transformer: Dehghani et al. 2018, arXiv 1807.03819, section 2.1).
    Being an embedding, it has no weight decay.
    """

    def __init__(self, loops: LoopsConfig, width: int) -> None:
        super().__init__(loops.count, width)

    def forward(self, x_BTD: Tensor, number: int) -> Tensor:  # type: ignore[override]
        return x_BTD + self.weight[number]
