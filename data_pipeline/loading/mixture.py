"""Several prepared folders as one. The source of each window is a pure function of its position."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.loading.order import Order
from data_pipeline.loading.prepared_data import PreparedData, SourceRange
from data_pipeline.storage.id_stream import IdStream


class Mixture:
    """Prepared folders of one tokenizer, each with a weight: its share of the windows that training visits.

    Validation reads the texts of all folders, one after the other, regardless of the weights.
    """

    def __init__(self, parts: Sequence[PreparedData], weights: Sequence[float]) -> None:
        """Raise DataError if the parts were made with different tokenizers."""
        first = parts[0]
        for part in parts[1:]:
            if part.tokenizer.fingerprint != first.tokenizer.fingerprint:
                raise DataError(
                    f"the folders of a mixture must share one tokenizer: {first.dir} was made with "
                    f"{first.tokenizer.spec} ({first.tokenizer.fingerprint[:12]}), {part.dir} with "
                    f"{part.tokenizer.spec} ({part.tokenizer.fingerprint[:12]}); prepare one of them again"
                )
        self.parts = list(parts)
        self.weights = whole_weights(weights)
        self.tokenizer = first.tokenizer
        self.dir = " + ".join(str(part.dir) for part in parts)  # its name in messages
        identity = [[part.fingerprint, weight] for part, weight in zip(parts, self.weights, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def split(self, name: str) -> IdStream:
        """Return the streams of all parts joined; for a test, of those that have one. Raises DataError if none has."""
        return IdStream.joined([part.split(name) for part in self._with(name)])

    def sources(self, split: str) -> list[SourceRange]:
        """Return the sources of all parts in stream order, named FOLDER, or FOLDER: NAME if a part has several."""
        found, offset = [], 0
        for part in self._with(split):
            own = part.sources(split)
            for source in own:
                name = str(part.dir) if len(own) == 1 else f"{part.dir}: {source.name}"
                found.append(SourceRange(name, offset + source.start, offset + source.stop))
            offset += len(part.split(split))
        return found

    def _with(self, split: str) -> list[PreparedData]:
        return [part for part in self.parts if part.manifest.splits.get(split)] or self.parts


class Interleaved:
    """Several orders as one, each with a fixed share of the positions: see `share_out`.

    The windows of the second source are numbered after those of the first, and so on.
    """

    def __init__(self, orders: Sequence[Order], num_windows: Sequence[int], weights: Sequence[int]) -> None:
        self._orders = orders
        self._offsets = list(accumulate(num_windows, initial=0))
        self._weights = weights

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        sources, counts = share_out(positions, self._weights)
        windows = np.empty(positions.shape, np.int64)
        for number, order in enumerate(self._orders):
            mine = sources == number
            windows[mine] = self._offsets[number] + order(counts[mine])
        return windows


def share_out(positions: NDArray[np.int64], weights: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source of each position and the number of earlier positions of that source: (sources, counts).

    Among the first p positions, source s has p · weights[s] / sum(weights), to less than the number of sources, for
    every p. So every batch is mixed like the whole. The first source takes the positions at which p · share, rounded,
    rises (Bresenham's line, "Algorithm for computer control of a digital plotter", 1965); the second takes its share of
    the remaining ones in the same way, and so on. Time and memory do not depend on p. sum(weights) is at most 2**31.
    """
    sources = np.full(positions.shape, len(weights) - 1, np.int64)
    counts = positions.astype(np.int64)
    left = np.arange(positions.size)
    total = sum(weights)
    for number, weight in enumerate(weights[:-1]):
        before = _rounded_share(counts[left], weight, total)
        mine = _rounded_share(counts[left] + 1, weight, total) > before
        sources[left[mine]] = number
        counts[left[mine]] = before[mine]
        counts[left[~mine]] -= before[~mine]
        left = left[~mine]
        total -= weight
    return sources, counts


def _rounded_share(count: NDArray[np.int64], weight: int, total: int) -> NDArray[np.int64]:
    """Return count · weight / total, rounded to the nearest integer, exact for every int64."""
    rounds, rest = np.divmod(count, total)
    return rounds * weight + (rest * weight + total // 2) // total


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Return positive numbers as integers in the same proportion.

    The proportion of their decimal digits is kept exactly, unless the integers need more than 31 bits together; then it
    is kept to one part in 2**30.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    unit = Fraction(1, math.lcm(*(fraction.denominator for fraction in fractions)))
    whole = [int(fraction / unit) for fraction in fractions]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    if (total := sum(whole)) > 1 << 31:
        whole = [max(1, (number << 30) // total) for number in whole]
    return whole
