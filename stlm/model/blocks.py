"""Blocks: attention and feed-forward around a residual stream, and stacks of them.

Shape letters: B batch, T positions, D width.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from stlm.config import TransformerCoreConfig
from stlm.model.attention import ATTENTIONS
from stlm.model.cache import KeyValueCache
from stlm.model.context import Context
from stlm.model.feed_forward import FEED_FORWARDS
from stlm.model.loops import LoopEmbeddings
from stlm.model.normalization import NORMS
from stlm.model.positions import POSITIONS, RotaryTable
from stlm.model.sharing import share


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x)): [B, T, D] → [B, T, D]."""

    def __init__(self, config: TransformerCoreConfig, width: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm.kind](config.norm, width)
        self.attention = ATTENTIONS[config.attention.kind](config.attention, width)
        self.feed_forward_norm = NORMS[config.norm.kind](config.norm, width)
        self.feed_forward = FEED_FORWARDS[config.feed_forward.kind](config.feed_forward, width)

    def forward(
        self, x_BTD: Tensor, rotary: RotaryTable, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, context, cache)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class TransformerStack(nn.Module):
    """The blocks of a `transformer` in a row: [B, T, D] → [B, T, D]. A core is one; so are local byte models."""

    def __init__(self, config: TransformerCoreConfig, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, width) for _ in range(config.num_layers))
        share(self.blocks, config.sharing)
        self.order = config.loops.order(config.num_layers)
        self.loop_embeddings = LoopEmbeddings(config.loops, width) if config.loops.embeddings else None
        self.positions = POSITIONS[config.positions.kind](config.positions, config.attention.head_width_of(width))

    def new_cache(self) -> list[KeyValueCache]:
        """One empty cache for each layer that is run: one that is run twice sees other vectors each time."""
        return [block.attention.new_cache() for block in self._run()]

    @property
    def depth(self) -> int:
        """Layers that are run: one that is run twice counts twice."""
        return len(self.order)

    def last_of_branches(self) -> list[nn.Linear]:
        """The last matrices of every attention and feed-forward, as often as they are run: each time, what they give is
        added to the residual stream."""
        lasts: list[nn.Linear] = []
        for block in self._run():
            lasts += [block.attention.output, *block.feed_forward.lasts()]
        return lasts

    def _run(self) -> list[Block]:
        """The blocks in the order in which they are run."""
        return [cast(Block, self.blocks[layer]) for layer, _ in self.order]

    def forward(self, x_BTD: Tensor, context: Context, cache: list[KeyValueCache] | None = None) -> Tensor:
        first = cache[0].length if cache else 0
        rotary = self.positions.rotary(first, x_BTD.size(1), x_BTD.device)
        for place, (layer, number) in enumerate(self.order):
            if number is not None and self.loop_embeddings is not None:
                x_BTD = self.loop_embeddings(x_BTD, number)
            x_BTD = self.blocks[layer](x_BTD, rotary, context, cache[place] if cache else None)
        return x_BTD
