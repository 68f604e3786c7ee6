"""Interface of objectives.

An objective returns sums, never means: splitting a batch over ranks and micro-batches does not change its sums, and the
trainer divides once by the count of the whole step. Shape letters: B batch, T ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from stlm.model import Output


class Batch(NamedTuple):
    """Rows of a step as read from the data."""

    ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool, false on padding
    document_ids: Tensor | None = None  # [B, T]: positions with equal numbers may attend; None: all

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `function` to each tensor; return a new batch."""
        documents = None if self.document_ids is None else function(self.document_ids)
        return Batch(function(self.ids), function(self.loss_mask), documents)


class Prepared(NamedTuple):
    """Inputs and targets of the model, and the mask of targets that count."""

    inputs: Tensor  # [B, T]: argument of the model's forward
    targets: Tensor  # [B, T]
    loss_mask: Tensor  # [B, T] bool
    document_ids: Tensor | None = None  # [B, T], as in Batch
    row_keys: Tensor | None = None  # [B]: keys of the model's random numbers in a training step


class Sums(NamedTuple):
    """Scalars; nats are float64."""

    nats: Tensor  # negative log-likelihood of the counted targets; carries the gradient
    ids: Tensor  # counted targets
    bytes: Tensor  # of text that the counted targets stand for


class Objective(Protocol):
    """The interface of every objective."""

    def __init__(self, z_loss_weight: float = 0.0) -> None: ...

    def prepare(self, batch: Batch, seed: int, step: int, row: int) -> Prepared:
        """Return inputs and targets of a batch whose first row is `row` of `step`.

        Anything random derives from (seed, step, row of the step) alone, so it does not depend on how rows are
        distributed over ranks.
        """
        ...

    def sums(self, output: Output, prepared: Prepared, bytes_per_id: Tensor) -> Sums:
        """Return the summed loss and counts of the model's output. `bytes_per_id`: the tokenizer's table, int [V].

        Further terms of the training loss are added to the output's auxiliary terms.
        """
        ...
