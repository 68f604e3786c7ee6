"""State shared by the parts of one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class Context:
    """Inputs and outputs common to all parts of a pass: document boundaries, loss terms, measures, random keys.

    `documents` [B, T]: the document number of each position of a layer; positions with different numbers do not see
    each other. None: one document. `used` [B, T]: False at empty positions, such as slots without a patch. None: all
    are used.

    `auxiliary`: terms of the loss by name, weighted sums over rows in nats. A part computes its term within each row
    and multiplies it by the row's `length` ids, so the sum does not depend on how rows are distributed over ranks and
    micro-batches. `measures`: ratios to log by name, each as two sums over rows. `values`: the values of the running
    stack's first layer, which later layers may mix with their own. `masks`: attention masks, shared by layers with
    the same window and cache length.

    `row_keys` [B]: keys of the random numbers of each row (see `row_random`); None, except in training: nothing is
    random. `exits`: the list to which the core appends the states at its exits, the last layer excluded; None: they
    are not collected. `wanted` [B, T]: True where the head computes logits; None: everywhere.
    """

    def __init__(
        self,
        documents: Tensor | None = None,
        whole: Context | None = None,
        row_keys: Tensor | None = None,
        exits: list[Tensor] | None = None,
        used: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> None:
        self.documents = documents
        self.used = used
        self.auxiliary: dict[str, Tensor] = whole.auxiliary if whole else {}
        self.measures: dict[str, Tensor] = whole.measures if whole else {}
        self.length: int = whole.length if whole else 0
        self.values: Tensor | None = None
        self.masks: dict[tuple[int | None, int], Tensor] = {}
        self.row_keys: Tensor | None = whole.row_keys if whole else row_keys
        self.exits: list[Tensor] | None = whole.exits if whole else exits
        self.wanted: Tensor | None = wanted

    def at(self, documents: Tensor | None, used: Tensor | None) -> Context:
        """Return a context of this pass for other positions, such as those of patches."""
        return Context(documents, self, used=used)

    def apart(self, values: Tensor | None) -> Context:
        """Return a copy whose loss terms and measures are collected separately until `take` merges them."""
        other = self.at(self.documents, self.used)
        other.auxiliary, other.measures, other.values = {}, {}, values
        return other

    def take(self, other: Context) -> None:
        """Merge the loss terms and measures of a copy made by `apart`."""
        self.values = other.values
        for name, nats in other.auxiliary.items():
            self.add(name, nats)
        for name, (total, count) in other.measures.items():
            self.measure(name, total, count)

    def pick(self, x_BTD: Tensor) -> Tensor:
        """Select the vectors whose logits are wanted: [B, T, D] → [number of them, D]; `x_BTD` itself if all are."""
        return x_BTD if self.wanted is None else x_BTD[self.wanted]

    def add(self, name: str, nats: Tensor) -> None:
        """Add a term to the loss under a name."""
        self.auxiliary[name] = self.auxiliary[name] + nats if name in self.auxiliary else nats

    def measure(self, name: str, total: Tensor, count: Tensor) -> None:
        """Log the ratio `total / count`, both summed over all rows of the step."""
        sums = torch.stack((total, count))
        self.measures[name] = self.measures[name] + sums if name in self.measures else sums
