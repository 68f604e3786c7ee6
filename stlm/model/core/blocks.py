"""Blocks: attention and feed-forward around a residual stream, and stacks of them.

Shape letters: B batch, T positions, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from stlm.config import LoopsConfig, ResidualConfig, TransformerCoreConfig
from stlm.model.context import Context
from stlm.model.core.attention import ATTENTIONS, GroupedQueryAttention
from stlm.model.core.feed_forward import FEED_FORWARDS, ExpertLinear, PlainFeedForward, SwiGLU
from stlm.model.core.normalization import NORMS
from stlm.model.core.positions import POSITIONS, Placement
from stlm.model.core.recomputation import Layers
from stlm.model.core.sharing import share
from stlm.model.decoding.cache import KeyValueCache
from stlm.model.decoding.packed_weights import Packable, Product, Products, normalize
from stlm.model.row_random import uniform


class BranchScale(nn.Module):
    """Factor of a branch's output: [..., D] → [..., D].

    A learned one is a vector that begins at the factor (LayerScale: Touvron et al. 2021, arXiv 2103.17239, section 2).
    """

    def __init__(self, config: ResidualConfig, width: int) -> None:
        super().__init__()
        self.scale = config.scale
        self.weight = nn.Parameter(torch.full((width,), config.scale)) if config.learned_scale else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return x * self.weight
        return x if self.scale == 1.0 else x * self.scale


class Block(nn.Module):
    """Pre-norm transformer block: [B, T, D] → [B, T, D].

    y = x + attention(norm(x)), then y + feed_forward(norm(y)); in parallel, x + attention(norm(x)) +
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


class PackedBlock:
    """Inference form of `Block`, equal within rounding.

    Attentions and feed-forwards without a packed form, such as experts, run unchanged.
    """

    def __init__(self, block: Block, products: Products) -> None:
        self.parallel = block.parallel
        self.attention, self.feed_forward = block.attention, block.feed_forward
        self.attention_norm = normalize(block.attention_norm)
        self.feed_forward_norm = normalize(block.feed_forward_norm)
        self.attention_scale, self.feed_forward_scale = block.attention_scale, block.feed_forward_scale
        attention, feed_forward = block.attention, block.feed_forward
        if isinstance(attention, GroupedQueryAttention):
            self.heads = products.of(attention.query, attention.key, attention.value)
            self.output = products.of(attention.output)
        if isinstance(feed_forward, SwiGLU):
            self.up, self.down = products.of(feed_forward.gate, feed_forward.up), products.of(feed_forward.down)
        elif isinstance(feed_forward, PlainFeedForward):
            self.up, self.down = products.of(feed_forward.up), products.of(feed_forward.down)

    def __call__(
        self, x_BTD: Tensor, placement: Placement, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        shape, x_RD = x_BTD.shape, x_BTD.flatten(0, 1)
        y_RD = self._attended(x_RD, shape, placement, context, cache)
        normed_RD = self.feed_forward_norm(x_RD if self.parallel else y_RD)
        if isinstance(self.feed_forward, SwiGLU | PlainFeedForward):
            inner_RF = self.feed_forward.inner(self.up(normed_RD))
            return add_branch(y_RD, self.down, inner_RF, self.feed_forward_scale).view(shape)
        z_BTD = self.feed_forward(normed_RD.view(shape), context)
        return y_RD.view(shape) + self.feed_forward_scale(z_BTD)

    def _attended(
        self, x_RD: Tensor, shape: torch.Size, placement: Placement, context: Context, cache: KeyValueCache | None
    ) -> Tensor:
        """Return the residual stream after attention: [R, D]."""
        normed_RD = self.attention_norm(x_RD)
        if not isinstance(self.attention, GroupedQueryAttention):
            y_BTD = self.attention(normed_RD.view(shape), placement, context, cache)
            return x_RD + self.attention_scale(y_BTD.flatten(0, 1))
        heads_BTHK = self.heads(normed_RD).view(*shape[:2], -1, self.attention.head_width)
        placed = self.attention.place(heads_BTHK.transpose(1, 2), placement)
        found_BTNK = self.attention.mix(*placed, placement, context, cache)
        return add_branch(x_RD, self.output, found_BTNK.reshape(x_RD.size(0), -1), self.attention_scale)


def add_branch(x_RD: Tensor, product: Product, y_RC: Tensor, scale: BranchScale) -> Tensor:
    """Add a branch to x; `product` is the branch's last matrix, and y its input."""
    if scale.weight is not None:
        return x_RD + scale(product(y_RC))
    return product.add_to(x_RD, y_RC, scale.scale)


class TransformerStack(Layers, Packable):
    """Sequence of blocks: [B, T, D] → [B, T, D]. The core uses one, and so do the local layers of byte patch models.

    `num_positions`: the largest number of positions; only learned positions need it.
    """

    def __init__(self, config: TransformerCoreConfig, width: int, num_positions: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, width, layer) for layer in range(config.num_layers))
        share(self.blocks, config.sharing)
        self.order = config.loops.order(config.num_layers)
        self.loop_embeddings = LoopEmbeddings(config.loops, width) if config.loops.embeddings else None
        positions = config.positions
        self.positions = POSITIONS[positions.kind](positions, config.attention, width, num_positions)
        self.dropout = LayerDropout(config.layer_dropout, self.depth)

    def pack(self, products: Products) -> None:
        self.packed = [PackedBlock(cast(Block, block), products) for block in self.blocks]

    def new_cache(self) -> list[KeyValueCache]:
        """Return an empty cache for each layer run; a layer that is run twice has two, as its inputs differ."""
        return [block.attention.new_cache() for block in self._run()]

    @property
    def depth(self) -> int:
        """Number of layers run; a layer that is run twice counts twice."""
        return len(self.order)

    def last_of_branches(self) -> list[nn.Linear | ExpertLinear]:
        """Return the last matrix of every attention and feed-forward, as often as it is run: each time, its output is
        added to the residual stream."""
        lasts: list[nn.Linear | ExpertLinear] = []
        for block in self._run():
            lasts += [block.attention.output, block.feed_forward.down]
        return lasts

    def _run(self) -> list[Block]:
        """Return the blocks in the order in which they are run."""
        return [cast(Block, self.blocks[layer]) for layer, _ in self.order]

    def forward(
        self,
        x_BTD: Tensor,
        context: Context,
        cache: list[KeyValueCache] | None = None,
        layers: slice = slice(None),
    ) -> Tensor:
        """Run the blocks, or only those of the given `layers` on the output of the ones before."""
        run = range(self.depth)[layers]
        context.masks = {}
        first: int | Tensor = cache[run.start].length if cache else 0
        if cache and (begins_B := cache[run.start].begins_B) is not None:
            first = first - begins_B[:, None]
        if run.start == 0:
            x_BTD = self.positions.enter(x_BTD, first, context.documents)
        placement = self.positions.placement(first, x_BTD.size(1), x_BTD.device)
        blocks = self.packed or self.blocks
        for place in run:
            layer, number = self.order[place]
            if number is not None and self.loop_embeddings is not None:
                x_BTD = self.loop_embeddings(x_BTD, number)
            y_BTD = self.run_again(blocks[layer], x_BTD, placement, context, cache[place] if cache else None)
            x_BTD = self.dropout(x_BTD, y_BTD, place, context)
        return x_BTD


class LayerDropout(nn.Module):
    """Layer dropout of rows in training: (x before the layer, x after it) → x, [B, T, D] each.

    The rate rises from 0 at the first layer to `rate` at the last, in proportion to 2^(l / (L - 1)) - 1; nothing is
    rescaled (LayerSkip: Elhoushi et al. 2024, arXiv 2404.16710, section 3.1). A skipped layer is still computed: under
    ZeRO 3 all ranks must run all modules.
    """

    def __init__(self, rate: float, num_layers: int) -> None:
        super().__init__()
        self.rates = [rate * (2 ** (layer / max(1, num_layers - 1)) - 1) for layer in range(num_layers)]

    def forward(self, x_BTD: Tensor, y_BTD: Tensor, layer: int, context: Context) -> Tensor:
        if context.row_keys is None or self.rates[layer] == 0:
            return y_BTD
        skipped_B = uniform(context.row_keys, 1 + layer) < self.rates[layer]  # draw 0 chooses an exit
        return torch.where(skipped_B[:, None, None], x_BTD, y_BTD)


class LoopEmbeddings(nn.Embedding):
    """One vector for each pass of a loop, added to [B, T, D] where the pass begins; initialized to zero.

    It marks the pass for the layers (Universal Transformer: Dehghani et al. 2018, arXiv 1807.03819, section 2.1).
    Being an embedding, it has no weight decay.
    """

    def __init__(self, loops: LoopsConfig, width: int) -> None:
        super().__init__(loops.count, width)

    def forward(self, x_BTD: Tensor, number: int) -> Tensor:  # type: ignore[override]
        return x_BTD + self.weight[number]
