"""The embedder of the published byte model, which reads each id of a tokenizer as its bytes; its head predicts them.

From "Super Tiny Language Models" (Hillier et al. 2024, arXiv 2405.14159): a bidirectional encoder over the up to 12
bytes of a subword, pooled by their mean, and a decoder that predicts the 12 bytes of the next one independently of each
other. This version is lossless: there are as many slots as the longest id needs, marks distinguish ids of the same
bytes and special ids, and the likelihood of an id is exact.

Shape letters: B batch, T ids, S slots, N = B T ids, D width of the core, d width over bytes, A symbols, V ids.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from data_pipeline.plurals import number_of
from stlm.config import ModelConfig, PublishedEmbedderConfig, RMSNormConfig, SwiGLUConfig
from stlm.errors import ConfigError
from stlm.model.context import Context
from stlm.model.core.attention import attend
from stlm.model.core.feed_forward import ExpertLinear, SwiGLU
from stlm.model.core.normalization import RMSNorm
from stlm.model.core.recomputation import Layers
from stlm.model.embedders.base import EMBEDDERS, Embedder
from stlm.model.embedders.patching.rules import Patches
from stlm.model.registry import Vocabulary

PAD = 256  # symbols: the 256 bytes, the pad that fills the slots after an id's bytes, and from 257 on the marks


def symbols_of(vocabulary: Vocabulary, slots: int) -> Tensor:
    """Return the symbols of each id, different for every id: [V, S]. Raises ConfigError if an id needs more slots.

    Symbols are the id's bytes, then pads. A tokenizer may have several ids of the same bytes, such as a byte and a
    learned piece; the second of them ends in mark 257, the third in 258, and so on. Special ids have no bytes, and each
    has a mark.
    """
    spelt: list[list[int]] = []
    seen: dict[bytes, int] = {b"": 1}
    for spelling in vocabulary.spellings:
        count = seen.get(spelling, 0)
        seen[spelling] = count + 1
        spelt.append([*spelling, PAD + count] if count else [*spelling])
    longest = max(range(vocabulary.size), key=lambda id: len(spelt[id]))
    if (needed := len(spelt[longest])) > slots:
        raise ConfigError(
            f"model.embedder.slots: got {slots}, expected at least the {number_of(needed, 'byte')} of id {longest} "
            f"({vocabulary.spellings[longest]!r}); {needed} would work, or a tokenizer with shorter pieces"
        )
    # Always on the CPU, even for a model on the meta device: sizes depend on the values.
    return torch.tensor([symbols + [PAD] * (slots - len(symbols)) for symbols in spelt], device="cpu")


def num_symbols(vocabulary: Vocabulary) -> int:
    """Return one more than the highest of `symbols_of`, without reading a tensor, which may have no values."""
    ids_of = Counter(vocabulary.spellings)
    marks = max(count if spelling == b"" else count - 1 for spelling, count in ids_of.items())
    return PAD + marks + 1


class SlotAttention(nn.Module):
    """Multi-head attention among the slots of one id, in both directions: [N, S, d] → [N, S, d]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x_NSd: Tensor, filled_NS: Tensor) -> Tensor:
        q, k, v = (
            project(x_NSd).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return self.output(attend(q, k, v, filled_NS[:, None, None]).transpose(1, 2).flatten(2))


class SlotBlock(nn.Module):
    """Pre-norm transformer block over the slots of one id; only filled slots are seen."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(RMSNormConfig(), width)
        self.attention = SlotAttention(width, num_heads)
        self.feed_forward_norm = RMSNorm(RMSNormConfig(), width)
        self.feed_forward = SwiGLU(SwiGLUConfig(), width)

    def forward(self, x_NSd: Tensor, filled_NS: Tensor) -> Tensor:
        x_NSd = x_NSd + self.attention(self.attention_norm(x_NSd), filled_NS)
        return x_NSd + self.feed_forward(self.feed_forward_norm(x_NSd))


class SlotStack(Layers):
    """Stack of `num_layers` slot blocks and a norm, with learned slot positions: [N, S, d] → [N, S, d]."""

    def __init__(self, num_layers: int, num_heads: int, width: int, slots: int) -> None:
        super().__init__()
        self.places = nn.Embedding(slots, width)
        self.blocks = nn.ModuleList(SlotBlock(width, num_heads) for _ in range(num_layers))
        self.norm = RMSNorm(RMSNormConfig(), width)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.blocks)

    def last_of_branches(self) -> list[nn.Linear | ExpertLinear]:
        """Return the last matrix of every attention and feed-forward, whose output is added to the residual stream."""
        lasts: list[nn.Linear | ExpertLinear] = []
        for block in self.blocks:
            assert isinstance(block, SlotBlock)
            lasts += [block.attention.output, block.feed_forward.down]
        return lasts

    def forward(self, x_NSd: Tensor, filled_NS: Tensor) -> Tensor:
        place_S = torch.arange(x_NSd.size(1), device=x_NSd.device)
        x_NSd = x_NSd + self.places(place_S) * self.places.embedding_dim**0.5
        for block in self.blocks:
            x_NSd = self.run_again(block, x_NSd, filled_NS)
        return self.norm(x_NSd)


@EMBEDDERS.register("paper")
class PublishedEmbedder(Embedder):
    """Embedder that reads each id by its bytes alone: [B, T] → [B, T, D].

    Empty slots are neither seen by the others nor part of the mean. The `Patches` hold one patch for each id: its
    vector, from which the head reconstructs its spelling if that is part of the loss.
    """

    symbols_VS: Tensor

    def __init__(self, config: PublishedEmbedderConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        symbols_VS = symbols_of(vocabulary, config.slots)
        device = torch.get_default_device()
        self.register_buffer("symbols_VS", symbols_VS.to(device), persistent=False)  # the tokenizer has it
        self.table = nn.Embedding(num_symbols(vocabulary), config.width)
        self.ngrams = None
        self.local = SlotStack(config.num_layers, config.num_heads, config.width, config.slots)
        self.project = nn.Linear(config.width, model.width, bias=False)

    def new_cache(self) -> None:
        return None

    def forward(self, inputs_BT: Tensor, context: Context, cache: None = None) -> tuple[Tensor, Patches]:
        symbols_NS = self.symbols_VS[inputs_BT.long()].flatten(0, 1)
        filled_NS = symbols_NS != PAD
        states_NSd = self.local(self.look_up(symbols_NS, context), filled_NS) * filled_NS[..., None]
        mean_Nd = states_NSd.sum(1) / filled_NS.sum(1, keepdim=True)
        x_BTD = self.project(mean_Nd).unflatten(0, inputs_BT.shape)
        index_BT = torch.arange(1, inputs_BT.size(1) + 1, device=inputs_BT.device).expand_as(inputs_BT)
        return x_BTD, Patches(x_BTD, index_BT, context.documents)
