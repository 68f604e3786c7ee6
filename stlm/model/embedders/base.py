"""The interface of embedders, which map ids to vectors for the core, and their registry.

At position t an embedder reads the id *before* t (the start symbol at 0): `Network` shifts the ids, once, so that
everything computed at position t may be used to predict id t.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stlm.model.context import Context
from stlm.model.embedders.ngrams import NgramCache, NgramEmbedding
from stlm.model.embedders.patching.rules import Patches
from stlm.model.registry import Registry


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
