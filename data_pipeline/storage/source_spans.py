"""The part of each split that comes from each source, for bits per byte by source.

The documents of a split are in the order of the sources, so each source has one contiguous part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.preparation.encoding import CHOICES
from data_pipeline.preparation.gathering import Gathered
from data_pipeline.storage.manifest import ShardEntry
from data_pipeline.storage.shards import Shard


def shares_of_sources(
    owners: Sequence[int], sources: int, gathered: Sequence[Gathered], output: Path, shards: Sequence[ShardEntry]
) -> list[dict[str, dict[str, int]]]:
    """Return {"train": {"documents": …, "ids": …}, "validation": …} for each source.

    owners: the source of each unit, ascending. sources: their number. gathered: the units. shards: all that were
    written to `output`.
    """
    shares: list[dict[str, dict[str, int]]] = [{} for _ in range(sources)]
    for split, choice in CHOICES.items():
        documents = np.zeros(len(shares), dtype=np.int64)
        for owner, unit in zip(owners, gathered, strict=True):
            documents[owner] += int((unit.choice == choice).sum())
        stops = np.cumsum(documents)
        ids = np.zeros(len(shares), dtype=np.int64)
        first = 0  # document of the split, counted over its shards
        for entry in shards:
            if not entry.path.startswith(f"{split}/"):
                continue
            sizes = Shard(output / entry.path).sizes
            cuts = np.clip(np.concatenate([[0], stops]) - first, 0, len(sizes))
            ids += [int(sizes[begin:end].sum(dtype=np.int64)) for begin, end in pairwise(cuts)]
            first += len(sizes)
        assert first == stops[-1], "the shards hold the documents that were chosen"
        for share, count, size in zip(shares, documents.tolist(), ids.tolist(), strict=True):
            share[split] = {"documents": count, "ids": size}
    return shares
