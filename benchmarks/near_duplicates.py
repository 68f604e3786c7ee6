#!/usr/bin/env python
"""Time and memory of near-duplicate removal, on generated short documents, a tenth of which repeat an earlier one with
a word or two changed.

    python benchmarks/near_duplicates.py [--documents 1000000] [--workers 2]

Prints one table. The rows are the steps of one run of the pipeline on the same files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.cleaning.documents import Cleaning
from data_pipeline.cleaning.exact_duplicates import drop_duplicates
from data_pipeline.cleaning.near_duplicates import near_duplicates, sign
from data_pipeline.preparation.gathering import gather
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation
from data_pipeline.preparation.workers import Workers
from data_pipeline.storage.documents import Gathered, starts_of

_WORDS = 20_000
_MEAN_LENGTH = 50  # words
_REPEATED = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "documents.jsonl")
        # Run in a separate process, so that its memory does not count.
        process = multiprocessing.get_context("spawn").Process(target=_generate, args=(path, options.documents))
        process.start()
        process.join()
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        size = path.stat().st_size
        units = Preparation(PrepareConfig(inputs=(str(path),), output=f"{folder}/out")).units()
        places = [Gathered(Path(folder, f"unit_{number}")) for number in range(len(units))]
        team = Workers(options.workers)
        rows = []

        def measure(step: str, work: Callable[[], object]) -> None:
            start = time.monotonic()
            work()
            rows.append((step, time.monotonic() - start))

        jobs = [(unit, place, Cleaning()) for unit, place in zip(units, places, strict=True)]
        measure(f"read ({options.workers} processes)", lambda: list(team.run(gather, jobs, size)))
        kept = np.ones(starts_of(places)[-1], np.bool_)
        measure("exact duplicates (1 process)", lambda: drop_duplicates(places, kept))
        measure(
            f"signatures ({options.workers} processes)", lambda: list(team.run(sign, [(one,) for one in places], size))
        )
        stays = np.empty(0, np.int64)

        def decide() -> None:
            nonlocal stays
            stays = near_duplicates(places, kept)

        measure("near-duplicates (1 process)", decide)
        gone = stays != np.arange(len(stays))
        similarity = np.load(path.with_suffix(".npy"))
        print(f"{options.documents:,} documents, {size / 1e6:,.0f} MB, {len(units)} units")
        print(f"{'step':<32}{'seconds':>10}{'documents/s':>14}{'MB/s':>10}")
        for step, seconds in [*rows, ("all", sum(seconds for _, seconds in rows))]:
            print(f"{step:<32}{seconds:>10.1f}{options.documents / seconds:>14,.0f}{size / 1e6 / seconds:>10.1f}")
        children = max(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, before)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"peak memory: {own / 1024:,.0f} MB in the main process, {children / 1024:,.0f} MB in the largest worker")
        print(f"{'similarity to the original':<32}{'documents':>10}{'left out':>14}")
        for low, high in ((0.85, 1), (0.8, 0.85), (0.75, 0.8), (1e-9, 0.75), (0, 1e-9)):
            those = kept & (similarity >= low) & (similarity < high)
            name = f"{low} to {high}" if low >= 0.1 else f"below {high}" if low else "no original"
            print(f"{name:<32}{those.sum():>10,}{(gone & those).sum():>14,}")


def _generate(path: Path, documents: int) -> None:
    """Write documents of frequent and rare random words; a tenth repeat an earlier one with one or two words changed.

    Also write each document's exact Jaccard similarity to its original, over runs of five words; 0 without one.
    """
    generator = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = np.array(["".join(generator.choice(letters, generator.integers(2, 10))) for _ in range(_WORDS)])
    similarity = np.zeros(documents)
    recent: list[list[str]] = []
    with path.open("w") as file:
        for number in range(documents):
            if recent and generator.random() < _REPEATED:
                original = recent[generator.integers(len(recent))]
                words = original.copy()
                for place in generator.integers(0, len(words), generator.integers(1, 3)).tolist():
                    words[place] = str(vocabulary[generator.integers(_WORDS)])
                a, b = (
                    {tuple(text[place : place + 5]) for place in range(len(text) - 4)} for text in (original, words)
                )
                similarity[number] = len(a & b) / len(a | b)
            else:
                length = int(generator.integers(_MEAN_LENGTH // 2, _MEAN_LENGTH * 3 // 2))
                ranks = np.minimum(generator.zipf(1.3, length), _WORDS) - 1
                words = vocabulary[ranks].tolist()
                recent = [*recent[-999:], words] if number % 10 == 0 else recent
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    np.save(path.with_suffix(".npy"), similarity)


if __name__ == "__main__":
    main()
