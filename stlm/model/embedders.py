"""Embedders: ids in, vectors for the core out.

What an embedder reads at position t is the id *before* t (the start symbol at 0): `STLM` shifts the ids, once, so
that everything computed at position t may be used to predict id t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import ByteEmbedderConfig, BytePatchEmbedderConfig, ModelConfig, TokenEmbedderConfig
from stlm.errors import ConfigError
from stlm.model.cache import KeyValueCache
from stlm.model.context import Context
from stlm.model.layers import TransformerStack
from stlm.model.patching import FixedPatching
from stlm.model.registry import Registry


class Patches(NamedTuple):
    """What a head needs to come back from patches to bytes (d: width of the byte states)."""

    states_BTd: Tensor  # what the local encoder says at each byte position
    index_BT: Tensor  # the patch of each position: 1 … P for those that began in this call, 0 for the one before
    documents_BP: Tensor | None = None  # the document of each patch, where documents are kept apart


class Embedder(nn.Module):
    """Interface of every embedder."""

    table: nn.Embedding  # [V, d]: what a tied head shares

    def look_up(self, inputs_BT: Tensor) -> Tensor:
        """Rows of the table times sqrt(d) (Vaswani et al. 2017, arXiv 1706.03762, section 3.4): [B, T, d].

        A tied table must begin small, or the first logits are far from uniform; what the layers read must not, or
        their own noise drowns it. The factor serves both (docs/LOG.md has the numbers).
        """
        return self.table(inputs_BT) * self.table.embedding_dim**0.5

    def new_cache(self) -> Any:
        """Empty decoding state for `forward(inputs, context, cache)`; None where there is nothing to remember."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forward(self, inputs_BT: Tensor, context: Context, cache: Any = None) -> tuple[Tensor, Patches | None]:
        """Ids → (x_BPD, patches). Token models have P = T and patches None."""
        raise TypeError(f"{type(self).__name__} defines no forward()")


EMBEDDERS: Registry[Embedder] = Registry("embedder")


@EMBEDDERS.register("token")
class TokenEmbedder(Embedder):
    """One learned vector for each id of the vocabulary: [B, T] → [B, T, D]."""

    def __init__(self, config: TokenEmbedderConfig, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, model.width)

    def new_cache(self) -> None:
        return None

    def forward(self, inputs_BT: Tensor, context: Context, cache: None = None) -> tuple[Tensor, None]:
        return self.look_up(inputs_BT), None


@EMBEDDERS.register("byte")
class ByteEmbedder(TokenEmbedder):
    """The token embedder over the 256 bytes: a plain byte transformer, one position a byte."""

    def __init__(self, config: ByteEmbedderConfig, model: ModelConfig, vocab_size: int) -> None:
        require_bytes("byte", vocab_size)
        super().__init__(TokenEmbedderConfig(), model, vocab_size)


class BytePatchCache:
    """Decoding state of `BytePatchEmbedder`: the local encoder's, the last byte states, and the position."""

    def __init__(self, local: list[KeyValueCache]) -> None:
        self.local = local
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

    def __init__(self, config: BytePatchEmbedderConfig, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        require_bytes("byte_patch", vocab_size)
        self.patching = FixedPatching(config.patch_size)
        self.table = nn.Embedding(vocab_size, config.width)
        self.local = TransformerStack(config.width, config.num_layers, config.num_heads, window=config.window)
        self.project = nn.Linear(config.patch_size * config.width, model.width, bias=False)

    def new_cache(self) -> BytePatchCache:
        return BytePatchCache(self.local.new_cache())

    def forward(
        self, inputs_BT: Tensor, context: Context, cache: BytePatchCache | None = None
    ) -> tuple[Tensor, Patches]:
        documents_BT = context.documents
        size, length = self.patching.size, inputs_BT.size(1)
        offset = cache.length if cache else 0
        states_BTd = self.local(self.look_up(inputs_BT), context, cache.local if cache else None)

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


def require_bytes(kind: str, vocab_size: int) -> None:
    """A byte embedder reads the byte vocabulary and no other."""
    if vocab_size != 256:
        raise ConfigError(
            f"model.embedder.kind: got {kind!r} with a vocabulary of {vocab_size} ids, expected the 256 bytes; "
            "set data.tokenizer=byte, or model.embedder.kind=token"
        )
