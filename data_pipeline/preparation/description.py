"""The manifest's description of every source: the text that was read, its problems, its division into documents, and
its span of every split, by which bits per byte are reported for each source.

The documents of a split are in the order of the sources, so each source has one contiguous span.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.sources.files import Files
from data_pipeline.sources.plain_text import check_found, describe
from data_pipeline.sources.problems import Problems, left_out_by_reading
from data_pipeline.sources.source import Source
from data_pipeline.storage.documents import CHOICES, Gathered
from data_pipeline.storage.manifest import ShardEntry
from data_pipeline.storage.shards import Shard


def describe_sources(
    sources: Sequence[Source], gathered: Sequence[Gathered], output: Path, shards: Sequence[ShardEntry]
) -> list[dict[str, Any]]:
    """Describe every source for the manifest. shards: all that were written to `output`."""
    described = []
    spans = _spans(len(sources), gathered, output, shards)
    divisions = _divisions(len(sources), gathered)
    rule = next((source.reading().division for source in sources if isinstance(source, Files)), None)
    for number, source in enumerate(sources):
        counts = [place.counts for place in gathered if place.source == number]
        problems, division = _problems_of(number, source, gathered), divisions[number]
        described.append(
            {
                "name": source.name,
                **source.describe(),
                "documents": sum(count["documents"] for count in counts),
                "text_bytes": sum(count["bytes"] for count in counts),
                "problems": dict(problems.counts),
                "examples": problems.examples[:10],
                **({"left_out": problems.left_out} if problems.left_out else {}),
                **({"division": {"text": describe(rule, division), **division}} if rule and division else {}),
                **spans[number],
            }
        )
    return described


def split_rule(config: PrepareConfig) -> dict[str, str]:
    """Describe the rule of the split for the manifest."""
    given = {
        split: " ".join(paths) for split, paths in (("validation", config.validation), ("test", config.test)) if paths
    }
    by_hash = {
        "hash": "first 8 bytes, little-endian, of blake2b-128 over the UTF-8 of the document",
        "validation": f"hash < {config.validation_fraction} * 2**64, in the order of the hashes, "
        "and about that share of the bytes: see data_pipeline/preparation/holdout.py",
    }
    return {"unit": "document", **({} if config.validation else by_hash), **given}


def check_separator(sources: Sequence[Source], gathered: Sequence[Gathered]) -> None:
    """Raise DataError if the user named a separator of documents, and no text holds it."""
    for source in sources:
        if isinstance(source, Files):
            check_found(source.reading().division, sum(_divisions(len(sources), gathered), Counter()))
            return  # one rule divides all text


def why_too_few(sources: Sequence[Source], gathered: Sequence[Gathered]) -> str:
    """Describe remedies for too few documents, and the input left out while it was read, as the end of a message."""
    text = any("text" in source.kinds for source in sources if isinstance(source, Files))
    divide = "; plain text is divided at blank lines by --documents paragraphs, and into lines by lines" if text else ""
    left_out = left_out_by_reading([_problems_of(number, source, gathered) for number, source in enumerate(sources)])
    return divide + (f"; while it was read: {left_out}" if left_out else "")


def _problems_of(number: int, source: Source, gathered: Sequence[Gathered]) -> Problems:
    """Return the problems met while a source was searched and read."""
    problems = Problems(examples=[*source.problems.examples])
    problems.add(source.problems)
    for place in gathered:
        if place.source == number:
            count = place.counts
            problems.add(Problems(Counter(count["problems"]), left_out=count["left_out"]))
            problems.examples += count["examples"]
    return problems


def _divisions(sources: int, gathered: Sequence[Gathered]) -> list[Counter[str]]:
    """Return for each source how often each way of dividing plain text was used."""
    counts: list[Counter[str]] = [Counter() for _ in range(sources)]
    for place in gathered:
        counts[place.source].update(place.counts["division"])
    return counts


def _spans(
    sources: int, gathered: Sequence[Gathered], output: Path, shards: Sequence[ShardEntry]
) -> list[dict[str, dict[str, int]]]:
    """Return {"train": {"documents": …, "ids": …}, "validation": …} for each source."""
    spans: list[dict[str, dict[str, int]]] = [{} for _ in range(sources)]
    for split, choice in CHOICES.items():
        documents = np.zeros(sources, dtype=np.int64)
        for place in gathered:
            documents[place.source] += int((place.choice == choice).sum())
        stops = np.cumsum(documents)
        ids = np.zeros(sources, dtype=np.int64)
        first = 0  # document of the split, counted over its shards
        for entry in shards:
            if not entry.path.startswith(f"{split}/"):
                continue
            sizes = Shard(output / entry.path).sizes
            cuts = np.clip(np.concatenate([[0], stops]) - first, 0, len(sizes))
            ids += [int(sizes[begin:end].sum(dtype=np.int64)) for begin, end in pairwise(cuts)]
            first += len(sizes)
        assert first == stops[-1], "the shards hold the documents that were chosen"
        for span, count, size in zip(spans, documents.tolist(), ids.tolist(), strict=True):
            span[split] = {"documents": count, "ids": size}
    return spans
