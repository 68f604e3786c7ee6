"""The byte patch model: local layers gather bytes into patches for the core, and spell each patch out again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import (
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    GroupedQueryConfig,
    ModelConfig,
    TransformerCoreConfig,
)
from stlm.errors import ConfigError
from stlm.model.blocks import TransformerStack
from stlm.model.cache import KeyValueCache
from stlm.model.context import Context
from stlm.model.embedders import EMBEDDERS, Embedder, require_bytes
from stlm.model.heads import HEADS, Head
from stlm.model.ngrams import NgramCache, NgramEmbedding
from stlm.model.normalization import NORMS
from stlm.model.patching import FixedPatching, Patches
from stlm.model.vocabulary import Vocabulary


def local_layers(config: BytePatchEmbedderConfig | BytePatchHeadConfig) -> TransformerCoreConfig:
    """The layers that read and spell bytes: those of a core with its defaults, and a window."""
    attention = GroupedQueryConfig(num_heads=config.num_heads, window=config.window)
    return TransformerCoreConfig(num_layers=config.num_layers, attention=attention)


class BytePatchCache:
    """Decoding state of `BytePatchEmbedder`: the local encoder's, the last byte states, and the position."""

    def __init__(self, local: list[KeyValueCache], ngrams: NgramCache | None) -> None:
        self.local = local
        self.ngrams = ngrams
        self.tail_BSd: Tensor | None = None  # states of the last patch_size - 1 positions
        self.length = 0


@EMBEDDERS.register("byte_patch")
class BytePatchEmbedder(Embedder):
    """Bytes → causal local encoder → one vector a patch: [B, T] → [B, T / patch_size, D].

    A small windowed transformer of width d reads the bytes. The vector of a patch is a projection of the last
    `patch_size` byte states up to the position where the patch begins to be predicted, as MegaByte (arXiv 2305.07185,
    section 2.1) concatenates byte embeddings; the encoder in front of it is BLT's (arXiv 2412.09871, section 3.2).

    Where documents are kept apart, a patch belongs to the document in which it begins and sees no states of another,
    and the bytes of a document that begins inside a patch have none until the next patch begins.
    """

    def __init__(self, config: BytePatchEmbedderConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        require_bytes("byte_patch", vocabulary)
        self.patching = FixedPatching(config.patch_size)
        self.table = nn.Embedding(vocabulary.size, config.width)
        self.ngrams = NgramEmbedding(config.ngrams, config.width) if config.ngrams.table_size else None
        self.local = TransformerStack(local_layers(config), config.width)
        self.project = nn.Linear(config.patch_size * config.width, model.width, bias=False)

    def new_cache(self) -> BytePatchCache:
        return BytePatchCache(self.local.new_cache(), self.ngrams.new_cache() if self.ngrams is not None else None)

    def forward(
        self, inputs_BT: Tensor, context: Context, cache: BytePatchCache | None = None
    ) -> tuple[Tensor, Patches]:
        documents_BT = context.documents
        size, length = self.patching.size, inputs_BT.size(1)
        offset = cache.length if cache else 0
        bytes_BTd = self.look_up(inputs_BT, context, cache.ngrams if cache else None)
        states_BTd = self.local(bytes_BTd, context, cache.local if cache else None)

        if cache is None or cache.tail_BSd is None:
            recent = F.pad(states_BTd, (0, 0, size - 1, 0))  # before the first byte there is nothing: zeros
        else:
            recent = torch.cat((cache.tail_BSd, states_BTd), dim=1)
        first = self.patching.first_start(offset)
        if first < length:
            spans_BPdS = recent[:, first:].unfold(1, size, size)
            if documents_BT is not None:  # the last of a span is where its patch begins
                spans_BPS = F.pad(documents_BT, (size - 1, 0), value=-1).unfold(1, size, size)
                spans_BPdS = spans_BPdS * (spans_BPS == spans_BPS[..., -1:])[:, :, None]
            x_BPD = self.project(spans_BPdS.transpose(2, 3).flatten(2)).to(states_BTd.dtype)
        else:  # no patch begins here
            x_BPD = states_BTd.new_zeros(inputs_BT.size(0), 0, self.project.out_features)
        if cache is not None:
            cache.tail_BSd = recent[:, recent.size(1) - (size - 1) :]
            cache.length += length
        index_BT = self.patching.patch_index(length, offset, inputs_BT.device).expand(inputs_BT.size(0), -1)
        if documents_BT is None:
            return x_BPD, Patches(states_BTd, index_BT)
        documents_BP = documents_BT[:, ::size]
        began_BT = documents_BP.gather(1, index_BT - 1) == documents_BT  # else a position has no patch: its patch is 0
        return x_BPD, Patches(states_BTd, torch.where(began_BT, index_BT, 0), documents_BP)


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

    def __init__(self, config: BytePatchHeadConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if not isinstance(model.embedder, BytePatchEmbedderConfig):
            raise ConfigError(
                f"model.head.kind: got 'byte_patch' with a {model.embedder.kind} embedder, expected 'linear'"
            )
        width = model.embedder.width
        self.project = nn.Linear(model.width, width, bias=False)
        layers = local_layers(config)
        self.local = TransformerStack(layers, width)
        self.norm = NORMS[layers.norm.kind](layers.norm, width)
        self.output = nn.Linear(width, vocabulary.size, bias=False)

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
