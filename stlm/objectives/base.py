"""What every objective takes and gives.

An objective returns sums, never means: a batch that is split over ranks and micro-batches has the same sums, and the
trainer divides once by the count of the whole step. Shape letters: B batch, T ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from stlm.model import Output


class Batch(NamedTuple):
    """Rows of a step as they were read."""

    ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool, false on padding
    document_ids: Tensor | None = None  # [B, T]: equal where attention may pass; None: everywhere

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of what `function` makes of each tensor."""
        documents = None if self.document_ids is None else function(self.document_ids)
        return Batch(function(self.ids), function(self.loss_mask), documents)


class Prepared(NamedTuple):
    """What the model reads, what it is to predict, and which predictions count."""

    inputs: Tensor  # [B, T]: what is given to the model's forward
    targets: Tensor  # [B, T]
    loss_mask: Tensor  # [B, T] bool
    document_ids: Tensor | None = None  # [B, T], as in Batch
    row_keys: Tensor | None = None  # [B]: what a training step leaves to chance in the model comes from them


class Sums(NamedTuple):
    """Scalars, float64 but for ids and bytes."""

    nats: Tensor  # negative log-likelihood of the counted targets; carries the gradient
    ids: Tensor  # counted targets
    bytes: Tensor  # of text that they stand for


class Objective(Protocol):
    """The interface of every objective."""

    def __init__(self, z_loss_weight: float = 0.0) -> None: ...

    def prepare(self, batch: Batch, seed: int, step: int, row: int) -> Prepared:
        """Inputs and targets of a batch whose first row is `row` of `step`.

        What is random derives from (seed, step, row of the step) alone, so it is the same however rows are shared out.
        """
        ...

    def sums(self, output: Output, prepared: Prepared, bytes_per_id: Tensor) -> Sums:
        """What the model's output costs. `bytes_per_id`: the tokenizer's table, int [V].

        What training adds to the loss joins the output's auxiliary terms.
        """
        ...
