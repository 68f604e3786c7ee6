"""The transformer core. Most of the compute is here."""

from __future__ import annotations

from torch import Tensor

from stlm.config import ModelConfig, TransformerCoreConfig
from stlm.model.context import Context
from stlm.model.core.base import CORES, Core
from stlm.model.core.blocks import TransformerStack
from stlm.model.core.normalization import NORMS
from stlm.model.decoding.cache import KeyValueCache


@CORES.register("transformer")
class TransformerCore(Core):
    """A stack of blocks and a final norm, shared by all exits."""

    def __init__(self, config: TransformerCoreConfig, model: ModelConfig) -> None:
        super().__init__()
        self.stack = TransformerStack(config, model.width, model.embedder.positions_of(model.context_length))
        self.exit_weights = config.exits.weights(self.stack.depth)
        self.depths = (*self.exit_weights, self.stack.depth)
        self.norm = NORMS[config.norm.kind](config.norm, model.width)

    def new_cache(self) -> list[KeyValueCache]:
        return self.stack.new_cache()

    def forget(self, cache: list[KeyValueCache], positions: int) -> None:
        for layer in cache:
            layer.truncate(layer.length - positions)

    def advance(self, x_BPD: Tensor, context: Context, cache: list[KeyValueCache] | None, stage: int) -> Tensor:
        if x_BPD.size(1) == 0:  # a step inside a patch adds no core position
            return x_BPD
        return self.stack(x_BPD, context, cache, slice((0, *self.depths)[stage], self.depths[stage]))

    def finish(self, x_BPD: Tensor) -> Tensor:
        return self.norm(x_BPD)
