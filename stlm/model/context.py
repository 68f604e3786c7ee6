"""What the parts of one forward pass share."""

from __future__ import annotations

from torch import Tensor


class Context:
    """Which positions may see each other, and what the parts add to the loss.

    `documents` [B, T] numbers the document of each position that a layer works on; nothing passes between positions
    whose numbers differ. None: all are of one. `auxiliary` holds what parts add to the loss, by name: sums over rows,
    in nats, already weighted. A part computes its term within each row and multiplies it by the row's ids, so that the
    sum is the same however rows are shared out over ranks and micro-batches. `row_keys` [B] is where a part draws its
    random numbers from (see `draws`), row by row; None, as always but in training: nothing is left to chance. `exits`
    is where the core leaves what its exits give out, the last layer not among them; None: nobody asks.
    """

    def __init__(
        self,
        documents: Tensor | None = None,
        auxiliary: dict[str, Tensor] | None = None,
        row_keys: Tensor | None = None,
        exits: list[Tensor] | None = None,
    ) -> None:
        self.documents = documents
        self.row_keys = row_keys
        self.exits = exits
        self.auxiliary: dict[str, Tensor] = {} if auxiliary is None else auxiliary

    def at(self, documents: Tensor | None) -> Context:
        """The same pass seen at other positions, such as those of patches."""
        return Context(documents, self.auxiliary, self.row_keys, self.exits)

    def add(self, name: str, nats: Tensor) -> None:
        """Add to the loss."""
        self.auxiliary[name] = self.auxiliary[name] + nats if name in self.auxiliary else nats
