"""Interface of objectives, and sums that several of them use.

An objective returns sums, never means: splitting a batch over ranks and micro-batches does not change its sums, and the
trainer divides once by the ids of the whole step. Shape letters: B batch, T ids, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from stlm.model import Output
from stlm.objectives.cross_entropy import cross_entropy


class Batch(NamedTuple):
    """Rows of a step: what the model reads, and what it has to predict."""

    ids: Tensor  # [B, T] int64: argument of the model's forward
    targets: Tensor  # [B, T] int64: as the loader gives them, equal to `ids`
    loss_mask: Tensor  # [B, T] bool: targets that count; false on padding
    row_keys: Tensor  # [B] int64: from (seed, step, row), for `stlm.model.row_random`
    document_ids: Tensor | None = None  # [B, T]: positions with equal numbers may attend; None: all

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `function` to each tensor; return a new batch."""
        documents = None if self.document_ids is None else function(self.document_ids)
        ids, targets, mask, keys = (function(tensor) for tensor in self[:4])
        return Batch(ids, targets, mask, keys, documents)

    def rows(self, first: int, last: int) -> Batch:
        """Return rows [first, last)."""
        return self.map(lambda tensor: tensor[first:last])

    def options(self, training: bool) -> dict[str, Tensor]:
        """Return the optional arguments of the model's forward. Random choices in the model are for training alone."""
        options = {"document_ids_BT": self.document_ids, "row_keys_B": self.row_keys if training else None}
        return {name: tensor for name, tensor in options.items() if tensor is not None}

    def counts(self, bytes_per_id: Tensor) -> Tensor:
        """Return how many targets count, and the bytes of text that they stand for: [2]. `bytes_per_id`: int [V]."""
        return torch.stack((self.loss_mask.sum(), (bytes_per_id[self.targets] * self.loss_mask).sum()))


class Loss(NamedTuple):
    """Summed loss of a batch: float64 scalars that carry the gradient."""

    nats: Tensor  # negative log-likelihood of the targets that count
    terms: dict[str, Tensor]  # further terms of the training loss by name, weighted


class Objective(ABC):
    """A training objective. `config`: its settings; `z_loss_weight`: weight of `z_loss`, for any objective."""

    def __init__(self, config: Any, z_loss_weight: float = 0.0) -> None:
        self.config = config
        self.z_loss_weight = z_loss_weight

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with the inputs and targets of this objective; by default the batch itself.

        Random choices follow from `batch.row_keys` alone, so they do not depend on how rows are distributed over ranks.
        """
        return batch

    @abstractmethod
    def loss(self, output: Output, batch: Batch) -> Loss:
        """Return the loss of the model's output for a prepared batch. Neither argument is changed."""


OBJECTIVES: dict[str, type[Objective]] = {}

Kind = TypeVar("Kind", bound=type[Objective])


def register(kind: str) -> Callable[[Kind], Kind]:
    """Register the decorated class as the objective of the config of this `kind`."""

    def add(cls: Kind) -> Kind:
        assert kind not in OBJECTIVES, f"two objectives are called {kind!r}"
        OBJECTIVES[kind] = cls
        return cls

    return add


def nats_of_rows(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Return the nats of each row's targets that count, computed in fp32 and summed in float64: [B]."""
    return torch.where(batch.loss_mask, cross_entropy(logits_BTV, batch.targets), 0.0).double().sum(1)


def z_loss(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Return log(Z)^2 summed over the targets that count, where Z is the divisor of the softmax: float64.

    It keeps logits close to log-probabilities (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, section 5).
    """
    return logits_BTV[batch.loss_mask].float().logsumexp(-1).square().double().sum()
