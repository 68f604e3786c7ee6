"""The embedder of byte patches: local layers encode bytes, and patches of them become vectors for the core."""

from __future__ import annotations

from typing import Any

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
from stlm.model.context import Context
from stlm.model.core.blocks import TransformerStack
from stlm.model.decoding.cache import KeyValueCache
from stlm.model.embedders.base import EMBEDDERS, Embedder
from stlm.model.embedders.byte import require_bytes
from stlm.model.embedders.ngrams import NgramCache, NgramEmbedding
from stlm.model.embedders.patching.learned import routing_of
from stlm.model.embedders.patching.rules import NOBODY, PATCHINGS, Patches, Taken
from stlm.model.registry import Vocabulary


def local_layers(config: BytePatchEmbedderConfig | BytePatchHeadConfig) -> TransformerCoreConfig:
    """Return the config of the local layers: a core's defaults with a window."""
    attention = GroupedQueryConfig(num_heads=config.num_heads, window=config.window)
    return TransformerCoreConfig(num_layers=config.num_layers, attention=attention)


class BytePatchCache:
    """Decoding state of `BytePatchEmbedder`: its parts' states, the last byte states, and the slots taken so far."""

    def __init__(self, local: list[KeyValueCache], ngrams: NgramCache | None, patching: Any) -> None:
        self.local = local
        self.ngrams = ngrams
        self.patching = patching
        self.tail_BSd: Tensor | None = None  # states of the last span - 1 positions
        self.taken: Taken | None = None


@EMBEDDERS.register("byte_patch")
class BytePatchEmbedder(Embedder):
    """Bytes → causal local encoder → one vector a patch: [B, T] → [B, P, D].

    A small windowed transformer of width d reads the bytes. The vector of a patch is a projection of the last `span`
    byte states up to the position where the patch begins to be predicted, as MegaByte (arXiv 2305.07185, section 2.1)
    concatenates byte embeddings; the encoder before it is BLT's (arXiv 2412.09871, section 3.2). A patching rule
    decides where patches begin. Empty slots hold zeros, and no position reads them.

    With separate documents, a patch belongs to the document in which it begins and sees no states of another, and the
    bytes of a document have no patch until its first one begins.
    """

    patches = True

    def __init__(self, config: BytePatchEmbedderConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        require_bytes("byte_patch", vocabulary)
        self.patching = PATCHINGS[config.patching.kind](config.patching, model, vocabulary)
        self.ragged = self.patching.ragged
        self.span = config.patching.span
        self.table = nn.Embedding(vocabulary.size, config.width)
        self.ngrams = NgramEmbedding(config.ngrams, config.width) if config.ngrams.table_size else None
        self.local = TransformerStack(local_layers(config), config.width)
        self.project = nn.Linear(self.span * config.width, model.width, bias=False)

    def new_cache(self) -> BytePatchCache:
        ngrams = self.ngrams.new_cache() if self.ngrams is not None else None
        return BytePatchCache(self.local.new_cache(), ngrams, self.patching.new_cache())

    def forward(
        self, inputs_BT: Tensor, context: Context, cache: BytePatchCache | None = None
    ) -> tuple[Tensor, Patches]:
        bytes_BTd = self.look_up(inputs_BT, context, cache.ngrams if cache else None)
        states_BTd = self.local(bytes_BTd, context, cache.local if cache else None)
        wanted_BT = self.patching(inputs_BT, states_BTd, context, cache.patching if cache else None)
        placed = self.patching.place(
            wanted_BT >= 0.5 if self.patching.learned else wanted_BT, context.documents, cache.taken if cache else None
        )
        if cache is not None and cache.taken is None:  # leftover slots would stay in the cache
            placed = placed._replace(start_BP=placed.start_BP[:, : int(placed.counts_B.max())])
        patches = placed.counts_B.sum()
        context.measure("patch_length", patches.new_full((), inputs_BT.numel()), patches)

        if cache is None or cache.tail_BSd is None:
            recent = F.pad(states_BTd, (0, 0, self.span - 1, 0))  # zeros before the first byte
        else:
            recent = torch.cat((cache.tail_BSd, states_BTd), dim=1)
        x_BPD, documents_BP = self._gather(recent, placed.start_BP, context.documents)
        counts = None
        if cache is not None:
            cache.tail_BSd = recent[:, recent.size(1) - (self.span - 1) :]
            cache.taken = placed.taken
            counts = placed.counts_B.tolist() if inputs_BT.size(0) > 1 else None
        routing = routing_of(wanted_BT, placed, documents_BP) if self.patching.learned else None
        return x_BPD, Patches(states_BTd, placed.index_BT, documents_BP, placed.start_BP >= 0, counts, routing)

    def _gather(self, recent: Tensor, start_BP: Tensor, documents_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of patches [B, P, D] and their documents. `recent`: span - 1 earlier states, then all."""
        used_BP = start_BP >= 0
        place_BPS = start_BP.clamp(min=0)[..., None] + torch.arange(self.span, device=start_BP.device)
        place_BM = place_BPS.flatten(1)
        spans_BMd = recent.gather(1, place_BM[..., None].expand(-1, -1, recent.size(2)))
        seen_BPS, documents_BP = used_BP[..., None], None
        if documents_BT is not None:  # a patch begins at the last position of its span
            around_BPS = F.pad(documents_BT, (self.span - 1, 0), value=NOBODY).gather(1, place_BM).view_as(place_BPS)
            documents_BP = torch.where(used_BP, around_BPS[..., -1], NOBODY)
            seen_BPS = seen_BPS & (around_BPS == documents_BP[..., None])
        spans_BPSd = spans_BMd.unflatten(1, place_BPS.shape[1:]) * seen_BPS[..., None]
        return self.project(spans_BPSd.flatten(2)).to(recent.dtype), documents_BP
