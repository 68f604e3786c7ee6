"""Patches that begin where a small byte model finds the next byte hard to predict."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stlm.config import EntropyPatchingConfig, ModelConfig
from stlm.model.context import Context
from stlm.model.core.base import CORES
from stlm.model.embedders.base import EMBEDDERS
from stlm.model.embedders.patching.rules import PATCHINGS, Patching
from stlm.model.heads.base import HEADS
from stlm.model.registry import Vocabulary


class ByteModel(nn.Module):
    """A plain byte model whose parts are named as in a separate model, so that its weights can be copied."""

    def __init__(self, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.embedder = EMBEDDERS[model.embedder.kind](model.embedder, model, vocabulary)
        self.core = CORES[model.core.kind](model.core, model)
        self.head = HEADS[model.head.kind](model.head, model, vocabulary)
        self.head.tie(self.embedder)

    def new_cache(self) -> tuple[Any, Any, Any]:
        return self.embedder.new_cache(), self.core.new_cache(), self.head.new_cache()

    def forward(self, inputs_BT: Tensor, context: Context, cache: tuple[Any, Any, Any] | None = None) -> Tensor:
        """Map inputs [B, T] to logits [B, T, V]."""
        embedder_cache, core_cache, head_cache = cache or (None, None, None)
        x_BTD, _ = self.embedder(inputs_BT, context, embedder_cache)
        return self.head(self.core(x_BTD, context, core_cache), inputs_BT, None, context, head_cache)


@PATCHINGS.register("entropy")
class EntropyPatching(Patching):
    """Rule by which a patch begins with each byte whose distribution has more than `threshold` bits of entropy.

    This is BLT's global threshold (Pagnoni et al. 2024, arXiv 2412.09871, section 2.3). The byte model and the
    threshold are frozen: set when a run begins, then saved and loaded with the model like all its parameters.

    Entropies are computed in fp32 at any precision of the model, so that patches are the same in training and in use.
    With a cache they are equal within rounding; only an entropy that close to the threshold could decide differently.
    """

    def __init__(self, config: EntropyPatchingConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, model, vocabulary)
        self.model = ByteModel(config.byte_model(model), vocabulary)
        self.threshold = nn.Parameter(torch.zeros(1))
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> EntropyPatching:
        """Stay in evaluation mode: the rule is frozen."""
        return super().train(False)

    def new_cache(self) -> Any:
        return self.model.new_cache()

    def forward(self, inputs_BT: Tensor, states_BTd: Tensor, context: Context, cache: Any = None) -> Tensor:
        return self.entropy(inputs_BT, context.documents, cache) > self.threshold

    @torch.no_grad()
    def entropy(self, inputs_BT: Tensor, documents_BT: Tensor | None = None, cache: Any = None) -> Tensor:
        """Return the entropy, in bits, of the byte after each input: [B, T]."""
        with torch.autocast(inputs_BT.device.type, enabled=False):
            logits_BTV = self.model(inputs_BT, Context(documents_BT), cache).float()
            log_BTV = logits_BTV.log_softmax(-1)
            return -(log_BTV.exp() * log_BTV).sum(-1) / math.log(2)
