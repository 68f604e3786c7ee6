"""What the parts of one forward pass share."""

from __future__ import annotations

import torch
from torch import Tensor


class Context:
    """Which positions may see each other, and what the parts add to the loss or measure.

    `documents` [B, T] numbers the document of each position that a layer works on; nothing passes between positions
    whose numbers differ. None: all are of one. `used` [B, T] is False where a position stands for nothing, as a slot
    without a patch does. None: all stand for something.

    `auxiliary` holds what parts add to the loss, by name: sums over rows, in nats, already weighted. A part computes
    its term within each row and multiplies it by the row's ids, so that the sum is the same however rows are shared out
    over ranks and micro-batches: `length` ids each. `measures` holds quotients to be told, by name: two sums over rows
    each. `values` are those of the first layer of the stack that is running, where later layers mix them with their
    own; `masks` those of its attentions, where several have the same beside their caches.

    `row_keys` [B] is where a part draws its random numbers from (see `draws`), row by row; None, as always but in
    training: nothing is left to chance. `exits` is where the core leaves what its exits give out, the last layer not
    among them; None: nobody asks. `wanted` [B, T] is True where the head shall give logits; None: everywhere.
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
        """The same pass seen at other positions, such as those of patches."""
        return Context(documents, self, used=used)

    def apart(self, values: Tensor | None) -> Context:
        """The same pass at the same positions, which keeps what it is told to itself until the first one takes it."""
        other = self.at(self.documents, self.used)
        other.auxiliary, other.measures, other.values = {}, {}, values
        return other

    def take(self, other: Context) -> None:
        """Add what one that was `apart` was told."""
        self.values = other.values
        for name, nats in other.auxiliary.items():
            self.add(name, nats)
        for name, (total, count) in other.measures.items():
            self.measure(name, total, count)

    def pick(self, x_BTD: Tensor) -> Tensor:
        """The vectors of which logits are wanted: [B, T, D] → [number of them, D], or all as they are."""
        return x_BTD if self.wanted is None else x_BTD[self.wanted]

    def add(self, name: str, nats: Tensor) -> None:
        """Add to the loss."""
        self.auxiliary[name] = self.auxiliary[name] + nats if name in self.auxiliary else nats

    def measure(self, name: str, total: Tensor, count: Tensor) -> None:
        """Have `total` / `count` told with the figures of a step, after each was summed over all rows."""
        sums = torch.stack((total, count))
        self.measures[name] = self.measures[name] + sums if name in self.measures else sums
