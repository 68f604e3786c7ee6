"""Heads: the core's vectors → logits of the next id at every position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stlm.config import BytePatchEmbedderConfig, BytePatchHeadConfig, LinearHeadConfig, ModelConfig
from stlm.errors import ConfigError
from stlm.model.cache import KeyValueCache
from stlm.model.context import Context
from stlm.model.embedders import Embedder, Patches
from stlm.model.layers import RMSNorm, TransformerStack
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


class BytePatchHeadCache:
    """Decoding state of `BytePatchHead`: the local decoder's, and the vector of the patch under way."""

    def __init__(self, local: list[KeyValueCache]) -> None:
        self.local = local
        self.current_B1d: Tensor | None = None


@HEADS.register("byte_patch")
class BytePatchHead(Head):
    """Decodes a patch byte by byte: [B, P, D] → [B, T, V].

    Each byte position adds its patch's vector to its own local state; a causal windowed transformer of width d then
    predicts the byte. So bytes inside a patch depend on each other, and the likelihood is exact (MegaByte's local
    model, arXiv 2305.07185, section 2.3, with BLT's reach across the patch's edge).
    """

    def __init__(self, config: BytePatchHeadConfig, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        if not isinstance(model.embedder, BytePatchEmbedderConfig):
            raise ConfigError(
                f"model.head.kind: got 'byte_patch' with a {model.embedder.kind} embedder, expected 'linear'"
            )
        width = model.embedder.width
        self.project = nn.Linear(model.width, width, bias=False)
        self.local = TransformerStack(width, config.num_layers, config.num_heads, window=config.window)
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, vocab_size, bias=False)

    def new_cache(self) -> BytePatchHeadCache:
        return BytePatchHeadCache(self.local.new_cache())

    def forward(
        self,
        x_BPD: Tensor,
        inputs_BT: Tensor,
        patches: Patches | None,
        context: Context,
        cache: BytePatchHeadCache | None = None,
    ) -> Tensor:
        assert patches is not None
        y_BPd = self.project(x_BPD)
        if cache is None or cache.current_B1d is None:
            current_B1d = y_BPd.new_zeros(y_BPd.size(0), 1, y_BPd.size(2))  # for positions without a patch
        else:
            current_B1d = cache.current_B1d
        y_BQd = torch.cat((current_B1d, y_BPd), dim=1)
        y_BTd = y_BQd.gather(1, patches.index_BT[..., None].expand(-1, -1, y_BQd.size(2)))
        if cache is not None:
            cache.current_B1d = y_BQd[:, -1:]
        z_BTd = self.local(patches.states_BTd + y_BTd, context, cache.local if cache else None)
        return self.output(self.norm(z_BTd))
