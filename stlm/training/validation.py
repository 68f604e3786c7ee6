"""Validation: the loss on all text that is held back, by its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from data_pipeline.loading.prepared_data import ValidationLoader
from data_pipeline.progress import Progress
from stlm.objectives import Objective
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.state_transfer import averaged_weights
from stlm.training.distributed.stopping import Interrupted, never
from stlm.training.distributed.watchdog import watched
from stlm.training.loaders import batch_of


class Sums(NamedTuple):
    """Sums over validation text, in float64."""

    nats: float
    ids: float
    bytes: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@watched("validation")
@torch.no_grad()
def validate(
    engine: Engine, objective: Objective, loader: ValidationLoader, seed: int, bytes_per_id: torch.Tensor,
    stop: Callable[[], bool] = never,
) -> dict[str, Sums]:  # fmt: skip
    """Return the sums for each source of the validation text, by name.

    Each rank reads every world_size-th group of windows. All ranks make the same number of forward passes, because
    ZeRO 3 gathers weights in each. A rank that runs out of windows reads a group again and does not count it. Where an
    average of the weights is kept, the average is validated, as checkpoints store it as their model. All ranks call
    `stop` before each forward pass; Interrupted is raised where it returns True.
    """
    distributed = engine.distributed
    windows, size = loader.num_windows, engine.split.micro_batch_size
    groups = -(-windows // size)
    names = loader.source_names
    totals = torch.zeros(len(names), len(Sums._fields), dtype=torch.float64, device=engine.device)
    turns = range(0, groups, distributed.world_size)
    engine.eval()
    with averaged_weights(engine):
        for turn in Progress(turns, "validation", unit=" forwards", leave=False, delay=2, disable=distributed.rank > 0):
            if stop():
                raise Interrupted
            group = turn + distributed.rank
            first = min(group, groups - 1) * size
            last = min(first + size, windows)
            batch = batch_of(loader.windows(first, last), seed, step=0, first=first)
            batch = objective.prepare(batch.map(lambda tensor: tensor.to(engine.device)))
            output = engine.forward(batch.ids, **batch.options(training=False))
            if group >= groups:
                continue
            sources = torch.from_numpy(loader.source_ids(first, last)).to(engine.device)
            for source in sources.unique().tolist():  # one source, except where two meet
                mine = batch._replace(loss_mask=batch.loss_mask & (sources == source))
                totals[source] += torch.cat((objective.loss(output, mine).nats[None], mine.counts(bytes_per_id)))
    flat = iter(distributed.sum_over_ranks(totals.flatten().tolist()))
    return {name: Sums(next(flat), next(flat), next(flat)) for name in names}


def total(parts: Iterable[Sums]) -> Sums:
    """Return the sums over all parts."""
    return Sums(*map(math.fsum, zip(*parts, strict=True)))
