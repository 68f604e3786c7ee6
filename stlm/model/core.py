"""Cores: [B, P, D] → [B, P, D], causal over positions. Where most of the compute is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stlm.config import ModelConfig, TransformerCoreConfig
from stlm.model.blocks import TransformerStack
from stlm.model.context import Context
from stlm.model.normalization import NORMS
from stlm.model.registry import Registry


class Core(nn.Module):
    """Interface of every core. P is T for token models, the number of patches for patch models."""

    def new_cache(self) -> Any:
        """Empty decoding state for `forward(x, context, cache)`."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forward(self, x_BPD: Tensor, context: Context, cache: Any = None) -> Tensor:
        """Transform P positions; with a cache they follow those of the calls before, and P may be 0."""
        raise TypeError(f"{type(self).__name__} defines no forward()")


CORES: Registry[Core] = Registry("core")


@CORES.register("transformer")
class TransformerCore(Core):
    """A stack of blocks and a final norm."""

    def __init__(self, config: TransformerCoreConfig, model: ModelConfig) -> None:
        super().__init__()
        self.stack = TransformerStack(config, model.width, model.embedder.positions_of(model.context_length))
        self.norm = NORMS[config.norm.kind](config.norm, model.width)

    def new_cache(self) -> Any:
        return self.stack.new_cache()

    def forward(self, x_BPD: Tensor, context: Context, cache: Any = None) -> Tensor:
        if x_BPD.size(1) == 0:  # a step inside a patch brings the core nothing new
            return x_BPD
        return self.norm(self.stack(x_BPD, context, cache))
