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
from stlm.model.experts import ExpertLinear
from stlm.model.feed_forward import FEED_FORWARDS
from stlm.model.loops import LoopEmbeddings
from stlm.model.normalization import NORMS
from stlm.model.positions import POSITIONS, Placement
from stlm.model.residual import BranchScale
from stlm.model.sharing import share


class Block(nn.Module):
    """Pre-norm transformer block: [B, T, D] → [B, T, D].

    x + attention(norm(x)), and then x + feed_forward(norm(x)) of what came out; in parallel, x + attention(norm(x)) +
    feed_forward(norm(x)) (GPT-NeoX: Black et al. 2022, arXiv 2204.06745, section 2.2).
    """

    def __init__(self, config: TransformerCoreConfig, width: int, layer: int) -> None:
        super().__init__()
        self.parallel = config.residual.parallel
        self.attention_norm = NORMS[config.norm.kind](config.norm, width)
        self.attention = ATTENTIONS[config.attention.kind](config.attention, config.norm, width, layer)
        self.feed_forward_norm = NORMS[config.norm.kind](config.norm, width)
        self.feed_forward = FEED_FORWARDS[config.feed_forward.kind](config.feed_forward, width)
        self.attention_scale = BranchScale(config.residual, width)
        self.feed_forward_scale = BranchScale(config.residual, width)

    def forward(
        self, x_BTD: Tensor, placement: Placement, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        y_BTD = x_BTD + self.attention_scale(self.attention(self.attention_norm(x_BTD), placement, context, cache))
        z_BTD = self.feed_forward(self.feed_forward_norm(x_BTD if self.parallel else y_BTD), context)
        return y_BTD + self.feed_forward_scale(z_BTD)


class TransformerStack(nn.Module):
    """The blocks of a `transformer` in a row: [B, T, D] → [B, T, D]. A core is one; so are local byte models.

    `num_positions`: how many there may be, which only learned positions need to know.
    """

    def __init__(self, config: TransformerCoreConfig, width: int, num_positions: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, width, layer) for layer in range(config.num_layers))
        share(self.blocks, config.sharing)
        self.order = config.loops.order(config.num_layers)
        self.loop_embeddings = LoopEmbeddings(config.loops, width) if config.loops.embeddings else None
        positions = config.positions
        self.positions = POSITIONS[positions.kind](positions, config.attention, width, num_positions)

    def new_cache(self) -> list[KeyValueCache]:
        """One empty cache for each layer that is run: one that is run twice sees other vectors each time."""
        return [block.attention.new_cache() for block in self._run()]

    @property
    def depth(self) -> int:
        """Layers that are run: one that is run twice counts twice."""
        return len(self.order)

    def last_of_branches(self) -> list[nn.Linear | ExpertLinear]:
        """The last matrix of every attention and feed-forward, as often as it is run: each time, what it gives is added
        to the residual stream."""
        lasts: list[nn.Linear | ExpertLinear] = []
        for block in self._run():
            lasts += [block.attention.output, block.feed_forward.down]
        return lasts

    def _run(self) -> list[Block]:
        """The blocks in the order in which they are run."""
        return [cast(Block, self.blocks[layer]) for layer, _ in self.order]

    def forward(self, x_BTD: Tensor, context: Context, cache: list[KeyValueCache] | None = None) -> Tensor:
        first = cache[0].length if cache else 0
        x_BTD = self.positions.enter(x_BTD, first, context.documents)
        placement = self.positions.placement(first, x_BTD.size(1), x_BTD.device)
        for place, (layer, number) in enumerate(self.order):
            if number is not None and self.loop_embeddings is not None:
                x_BTD = self.loop_embeddings(x_BTD, number)
            x_BTD = self.blocks[layer](x_BTD, placement, context, cache[place] if cache else None)
        return x_BTD
