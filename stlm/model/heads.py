"""Heads: the core's vectors → logits of the next id at every position."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stlm.config import BytePatchEmbedderConfig, LinearHeadConfig, ModelConfig
from stlm.errors import ConfigError
from stlm.model.context import Context
from stlm.model.embedders import Embedder
from stlm.model.patching import Patches
from stlm.model.registry import Registry


class Head(nn.Module):
    """Interface of every head. `output` is the last matrix, [V, d]; tied, it is the embedder's table itself."""

    output: nn.Linear

    def new_cache(self) -> Any:
        """Empty decoding state for `forward(…, cache)`; None where there is nothing to remember."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forward(
        self,
        x_BPD: Tensor,
        inputs_BT: Tensor,
        patches: Patches | None,
        context: Context,
        cache: Any = None,
    ) -> Tensor:
        """(x_BPD, inputs_BT, patches) → logits_BTV."""
        raise TypeError(f"{type(self).__name__} defines no forward()")


HEADS: Registry[Head] = Registry("head")


def tie(head: Head, embedder: Embedder) -> None:
    """Make the head's matrix and the embedder's table one tensor: one storage, one gradient, one saved copy."""
    assert head.output.weight.shape == embedder.table.weight.shape
    head.output.weight = embedder.table.weight


@HEADS.register("linear")
class LinearHead(Head):
    """logits = x W^T at every position: [B, T, D] → [B, T, V]."""

    def __init__(self, config: LinearHeadConfig, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        if isinstance(model.embedder, BytePatchEmbedderConfig):
            raise ConfigError("model.head.kind: got 'linear' with a byte_patch embedder, expected 'byte_patch'")
        self.output = nn.Linear(model.width, vocab_size, bias=False)

    def new_cache(self) -> None:
        return None

    def forward(
        self,
        x_BPD: Tensor,
        inputs_BT: Tensor,
        patches: Patches | None,
        context: Context,
        cache: None = None,
    ) -> Tensor:
        return self.output(x_BPD)
