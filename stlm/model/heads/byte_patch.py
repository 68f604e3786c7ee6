"""The head of byte patches: local layers decode patches into bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stlm.config import BytePatchEmbedderConfig, BytePatchHeadConfig, ModelConfig
from stlm.errors import ConfigError
from stlm.model.context import Context
from stlm.model.core.blocks import TransformerStack
from stlm.model.core.normalization import NORMS
from stlm.model.decoding.cache import KeyValueCache
from stlm.model.embedders.byte_patch import local_layers
from stlm.model.embedders.patching.learned import smooth, weigh
from stlm.model.embedders.patching.rules import Patches
from stlm.model.heads.base import HEADS, Head
from stlm.model.registry import Vocabulary


class BytePatchHeadCache:
    """Decoding state of `BytePatchHead`: the local decoder's, and the vector of the current patch."""

    def __init__(self, local: list[KeyValueCache]) -> None:
        self.local = local
        self.current_B1d: Tensor | None = None


@HEADS.register("byte_patch")
class BytePatchHead(Head):
    """Head that decodes patches byte by byte: [B, P, D] → [B, T, V].

    Each byte position adds its patch's vector to its local state; a causal windowed transformer of width d then
    predicts the byte. Bytes inside a patch depend on each other, and the likelihood is exact (MegaByte's local model,
    arXiv 2305.07185, section 2.3; as in BLT, it sees beyond the patch's edge).
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
        self.logit_cap = config.logit_cap

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
        if patches.routing is not None:
            y_BPd = smooth(y_BPd, patches.routing.probability_BP, current_B1d)
        y_BQd = torch.cat((current_B1d, y_BPd), dim=1)
        y_BTd = y_BQd.gather(1, patches.index_BT[..., None].expand(-1, -1, y_BQd.size(2)))
        if cache is not None:
            cache.current_B1d = y_BTd[:, -1:]
        if patches.routing is not None:
            y_BTd = weigh(y_BTd, patches.routing.sureness_BT)
        z_BTd = self.local(patches.states_BTd + y_BTd, context, cache.local if cache else None)
        return self.predict(self.norm(context.pick(z_BTd)))
