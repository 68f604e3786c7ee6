"""Embedders, which map ids to vectors for the core.

At position t an embedder reads the id *before* t (the start symbol at 0): `Network` shifts the ids, once, so that
everything computed at position t may be used to predict id t.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stlm.config import ByteEmbedderConfig, ModelConfig, TokenEmbedderConfig
from stlm.errors import ConfigError
from stlm.model.context import Context
from stlm.model.embedders.ngrams import NgramCache, NgramEmbedding
from stlm.model.embedders.patching.rules import Patches
from stlm.model.registry import Registry
from stlm.model.vocabulary import Vocabulary


class Embedder(nn.Module):
    """Interface of every embedder."""

    table: nn.Embedding  # [V, d], shared with a tied head
    patches = False  # whether there are fewer vectors than ids
    ragged = False  # whether, with a cache, the rows of a batch may get different numbers of vectors
    ngrams: NgramEmbedding | None
    scaled: bool = True  # whether vectors are multiplied by sqrt(d)
    read_scale = 1.0  # of the vectors read, see width_transfer.py

    def look_up(self, inputs_BT: Tensor, context: Context, cache: NgramCache | None = None) -> Tensor:
        """Return rows of the table times sqrt(d) (Vaswani et al. 2017, arXiv 1706.03762, section 3.4): [B, T, d].

        A tied table must begin small, or the first logits are far from uniform. The layers' input must not be small, or
        their initial noise outweighs it. The factor serves both (docs/LOG.md has the numbers). Vectors of n-grams, if
        configured, are added before it.
        """
        x_BTd = self.table(inputs_BT)
        if self.ngrams is not None:
            x_BTd = x_BTd + self.ngrams(inputs_BT, context, cache)
        return x_BTd * (self.table.embedding_dim**0.5 * self.read_scale) if self.scaled else x_BTd

    def new_cache(self) -> Any:
        """Return an empty decoding state for `forward(inputs, context, cache)`; None if the embedder keeps none."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forward(self, inputs_BT: Tensor, context: Context, cache: Any = None) -> tuple[Tensor, Patches | None]:
        """Return vectors [B, P, D] and their patches. Token models have P = T and patches None."""
        raise TypeError(f"{type(self).__name__} defines no forward()")


EMBEDDERS: Registry[Embedder] = Registry("embedder")


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


@EMBEDDERS.register("byte")
class ByteEmbedder(TokenEmbedder):
    """Token embedder over the 256 bytes, for plain byte transformers: one position a byte."""

    def __init__(self, config: ByteEmbedderConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        require_bytes("byte", vocabulary)
        super().__init__(config, model, vocabulary)


def require_bytes(kind: str, vocabulary: Vocabulary) -> None:
    """Raise ConfigError unless the vocabulary is the 256 bytes, the only one that byte embedders read."""
    if vocabulary.size != 256:
        raise ConfigError(
            f"model.embedder.kind: got {kind!r} with a vocabulary of {vocabulary.size} ids, expected the 256 bytes; "
            "set data.tokenizer=byte, or model.embedder.kind=token"
        )
