"""Hash n-gram embeddings: vectors for the ids up to each position, looked up in tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stlm.config.model.embedders.ngrams import NgramsConfig
from stlm.model.context import Context

PRIME = 2**31 - 1  # of the hash; ids below 2^32 times a power below it stay exact in int64
BASE = 1_000_003
NOTHING = -1  # in place of an id where there is none


class NgramCache:
    """Decoding state of `NgramEmbedding`: the last n - 1 ids."""

    def __init__(self) -> None:
        self.past_BS: Tensor | None = None


class NgramEmbedding(nn.Module):
    """The sum of the vectors of all n-grams that end at each id: ids [B, T] → [B, T, d].

    An n-gram's row in the table is a polynomial hash (BLT: Pagnoni et al. 2024, arXiv 2412.09871, section 3.2.1): the
    sum over i of the id i places back times BASE^i, modulo PRIME and then modulo the table's size. Every n has its own
    table. BLT averages n-grams with the byte's vector; here they begin at zero and their sum is divided by the root of
    their number, so a model begins as the one without n-grams, and rare n-grams add no noise.

    If fewer than n ids of the document have been read, there is no n-gram, and its vector is zero.
    """

    def __init__(self, config: NgramsConfig, width: int) -> None:
        super().__init__()
        self.table_size, self.shortest, self.longest = config.table_size, config.shortest, config.longest
        self.num_tables = self.longest - self.shortest + 1
        self.tables = nn.Embedding(self.num_tables * self.table_size, width)

    def new_cache(self) -> NgramCache:
        return NgramCache()

    def forward(self, inputs_BT: Tensor, context: Context, cache: NgramCache | None = None) -> Tensor:
        rows_BTG, exists_BTG = self.rows(inputs_BT, context.documents, cache)
        return (self.tables(rows_BTG) * exists_BTG[..., None]).sum(2) * self.num_tables**-0.5

    def rows(
        self, inputs_BT: Tensor, documents_BT: Tensor | None, cache: NgramCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the table rows of the G n-grams that end at each id, and whether each exists: [B, T, G] both."""
        inputs_BT = inputs_BT.long()
        reach, length = self.longest - 1, inputs_BT.size(1)
        if cache is None or cache.past_BS is None:
            past_BS = inputs_BT.new_full((inputs_BT.size(0), reach), NOTHING)
        else:
            past_BS = cache.past_BS
        ids = torch.cat((past_BS, inputs_BT), dim=1)
        if cache is not None:
            cache.past_BS = ids[:, ids.size(1) - reach :]
        if documents_BT is not None:
            documents = torch.cat((documents_BT.new_full(past_BS.shape, NOTHING), documents_BT), dim=1)

        hash_BT, exists_BT, power = torch.zeros_like(inputs_BT), torch.ones_like(inputs_BT, dtype=torch.bool), 1
        rows, exists = [], []
        for n in range(1, self.longest + 1):
            earlier = slice(self.longest - n, self.longest - n + length)  # the id n - 1 places back
            exists_BT = exists_BT & (ids[:, earlier] != NOTHING)
            if documents_BT is not None:
                exists_BT = exists_BT & (documents[:, earlier] == documents_BT)
            hash_BT = (hash_BT + ids[:, earlier] * power) % PRIME
            power = power * BASE % PRIME
            if n >= self.shortest:
                rows.append(hash_BT % self.table_size + (n - self.shortest) * self.table_size)
                exists.append(exists_BT)
        return torch.stack(rows, dim=2), torch.stack(exists, dim=2)
