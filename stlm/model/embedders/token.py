"""The token embedder: a table of learned vectors."""

from __future__ import annotations

from torch import Tensor, nn

from stlm.config import ByteEmbedderConfig, ModelConfig, TokenEmbedderConfig
from stlm.model.context import Context
from stlm.model.embedders.base import EMBEDDERS, Embedder
from stlm.model.embedders.ngrams import NgramCache, NgramEmbedding
from stlm.model.registry import Vocabulary


@EMBEDDERS.register("token")
class TokenEmbedder(Embedder):
    """One learned vector for each id of the vocabulary: [B, T] → [B, T, D].

    With a `rank` of r the table is a product of two (ALBERT: Lan et al. 2019, arXiv 1909.11942, section 3.1): V x r,
    and the `factor` r x D, scaled so that its output is as large as that of a full table.
    """

    def __init__(
        self, config: TokenEmbedderConfig | ByteEmbedderConfig, model: ModelConfig, vocabulary: Vocabulary
    ) -> None:
        super().__init__()
        rank = config.rank if isinstance(config, TokenEmbedderConfig) else None
        width = rank or model.width
        self.table = nn.Embedding(vocabulary.size, width)
        self.scaled = config.scaled
        self.ngrams = NgramEmbedding(config.ngrams, width) if config.ngrams.table_size else None
        self.factor = nn.Linear(rank, model.width, bias=False) if rank else None

    def new_cache(self) -> NgramCache | None:
        return self.ngrams.new_cache() if self.ngrams is not None else None

    def forward(self, inputs_BT: Tensor, context: Context, cache: NgramCache | None = None) -> tuple[Tensor, None]:
        x_BTd = self.look_up(inputs_BT, context, cache)
        if self.factor is None:
            return x_BTd, None
        return self.factor(x_BTd) * (self.factor.out_features / self.factor.in_features) ** 0.5, None
