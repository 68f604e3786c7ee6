"""The linear head: one matrix, which may be tied to the embedder's table."""

from __future__ import annotations

from torch import Tensor, nn

from stlm.config import BytePatchEmbedderConfig, LinearHeadConfig, ModelConfig, TokenEmbedderConfig
from stlm.errors import ConfigError
from stlm.model.context import Context
from stlm.model.embedders.base import Embedder
from stlm.model.embedders.patching.rules import Patches
from stlm.model.embedders.token import TokenEmbedder
from stlm.model.heads.base import HEADS, Head
from stlm.model.registry import Vocabulary


class TransposedLinear(nn.Linear):
    """Linear map x W where `nn.Linear` computes x W^T: [B, T, out] → [B, T, in], so that a matrix can be tied."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@HEADS.register("linear")
class LinearHead(Head):
    """Linear head: logits = x W^T at every position, [B, T, D] → [B, T, V].

    If the embedder's table is factorised into V x r and r x D, so is W (ALBERT, arXiv 1909.11942, section 3.1).
    """

    def __init__(self, config: LinearHeadConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if isinstance(model.embedder, BytePatchEmbedderConfig):
            raise ConfigError("model.head.kind: got 'linear' with a byte_patch embedder, expected 'byte_patch'")
        rank = model.embedder.rank if isinstance(model.embedder, TokenEmbedderConfig) else None
        self.factor = TransposedLinear(rank, model.width, bias=False) if rank else None
        self.output = nn.Linear(rank or model.width, vocabulary.size, bias=False)
        self.logit_cap = config.logit_cap

    def tie(self, embedder: Embedder) -> None:
        """Tie the tables, and where they are factorised, the second matrices."""
        super().tie(embedder)
        if self.factor is not None:
            assert isinstance(embedder, TokenEmbedder) and embedder.factor is not None
            self.factor.weight = embedder.factor.weight

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
        x = context.pick(x_BPD)
        return self.predict(x if self.factor is None else self.factor(x))
