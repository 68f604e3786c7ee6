"""Forward and backward passes of a training step, and forward passes of a validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.loading.prepared_data import TrainLoader, ValidationLoader
from data_pipeline.progress import Progress
from stlm.config import RunConfig
from stlm.objectives import Batch, Objective
from stlm.stlm import STLM
from stlm.training.deepspeed.engine import Engine
from stlm.training.deepspeed.state_transfer import averaged_weights
from stlm.training.distributed.stopping import Interrupted, never
from stlm.training.distributed.watchdog import watched
from stlm.training.loaders import batch_of
from stlm.training.metrics.throughput import Gauges
from stlm.training.optim.straight_through import rounded
from stlm.training.recovery import spoilt_unless_finite


class Passes:
    """Passes of a model on its engine. All ranks call every method."""

    def __init__(
        self, config: RunConfig, model: STLM, engine: Engine, objective: Objective, gauges: Gauges
    ) -> None:  # fmt: skip
        self._config = config
        self._model = model
        self._engine = engine
        self.distributed = engine.distributed
        self._objective = objective
        self._gauges = gauges
        self._bytes_per_id = torch.from_numpy(model.tokenizer.bytes_per_id).to(engine.device)

    def read(self, loader: TrainLoader, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step."""
        split = self._engine.split
        first = self.distributed.rank * split.rows
        batch = batch_of(loader.rows(step, first, first + split.rows), self._config.seed, step, first)
        offsets = range(0, split.rows, split.micro_batch_size)
        return [self._prepared(batch, slice(offset, offset + split.micro_batch_size)) for offset in offsets]

    def count(self, batches: list[Batch]) -> tuple[float, float]:
        """Return the ids that these batches of all ranks predict, and the bytes of text that those stand for."""
        counts = torch.stack([batch.counts(self._bytes_per_id) for batch in batches]).sum(0)
        ids, bytes = self.distributed.sum_over_ranks(counts.tolist())
        return ids, bytes

    def gradient(
        self, micro_batches: list[Batch], ids: float, used_up: float
    ) -> tuple[list[str], list[str], list[list[float]]]:
        """Compute the gradient of a step in which all ranks together predict `ids` ids.

        `used_up`: fraction of the run that ends with this step. Returns the names of the further terms of the loss and
        of the model's measures, and for each micro-batch: nats, the terms, and a sum and a count of each measure.
        """
        self._engine.train()
        sums = []
        with rounded(self._model, self._config.training, used_up), self._engine.accumulate():
            for batch in micro_batches:
                with self.distributed.stopwatch.phase("forward"):
                    output = self._counted_forward(batch)
                    nats, own_terms = self._objective.loss(output, batch)
                    added = {**output.auxiliary, **own_terms}
                    loss = spoilt_unless_finite(sum(added.values(), nats) / ids)
                self._engine.backward(loss, last=batch is micro_batches[-1])
                terms, measures = sorted(added), sorted(output.measures)  # the same in every forward
                parts = [nats, *(added[name] for name in terms)]
                parts += [half for name in measures for half in output.measures[name]]
                sums.append(torch.stack([value.detach().double() for value in parts]))
        return terms, measures, torch.stack(sums).tolist()

    @watched("validation")
    @torch.no_grad()
    def validate(
        self, loader: ValidationLoader, stop: Callable[[], bool] = never
    ) -> dict[str, tuple[float, float, float]]:  # fmt: skip
        """Return (nats, ids, bytes) for each source of the validation text, by name, summed in float64.

        Each rank reads every world_size-th group of windows. All ranks make the same number of forward passes, because
        ZeRO 3 gathers weights in each. A rank that runs out of windows reads a group again and does not count it. Where
        an average of the weights is kept, the average is validated, as checkpoints store it as their model. All ranks
        call `stop` before each forward pass; Interrupted is raised where it returns True.
        """
        windows, size = loader.num_windows, self._engine.split.micro_batch_size
        groups = -(-windows // size)
        names = loader.source_names
        totals = torch.zeros(len(names), 3, dtype=torch.float64, device=self._engine.device)
        ranks = self.distributed.ranks
        turns = range(0, groups, ranks.world_size)
        self._engine.eval()
        with averaged_weights(self._engine):
            for turn in Progress(turns, "validation", unit=" forwards", leave=False, delay=2, disable=ranks.rank != 0):
                if stop():
                    raise Interrupted
                group = turn + ranks.rank
                first = min(group, groups - 1) * size
                last = min(first + size, windows)
                batch = self._prepared(batch_of(loader.windows(first, last), self._config.seed, 0, first))
                output = self._forward(batch)
                if group >= groups:
                    continue
                sources = torch.from_numpy(loader.source_ids(first, last)).to(self._engine.device)
                for source in sources.unique().tolist():  # one source, except where two meet
                    mine = batch._replace(loss_mask=batch.loss_mask & (sources == source))
                    nats = self._objective.loss(output, mine).nats
                    totals[source] += torch.cat((nats[None], mine.counts(self._bytes_per_id)))
        flat = self.distributed.sum_over_ranks(totals.flatten().tolist())
        return {name: (flat[3 * n], flat[3 * n + 1], flat[3 * n + 2]) for n, name in enumerate(names)}

    def _prepared(self, batch: Batch, rows: slice = slice(None)) -> Batch:
        return self._objective.prepare(batch.map(lambda tensor: tensor[rows].to(self._engine.device)))

    def _counted_forward(self, batch: Batch) -> Any:
        if self._config.training.compile and not self._gauges.has_counted:
            with torch.no_grad(), self._gauges.counting():  # a compiled program hides its matrix products
                self._model.forward(batch.ids, **_given(batch, training=True))
            return self._forward(batch, training=True)
        with self._gauges.counting():
            return self._forward(batch, training=True)

    def _forward(self, batch: Batch, training: bool = False) -> Any:
        return self._engine.forward(batch.ids, **_given(batch, training))


def _given(batch: Batch, training: bool) -> dict[str, torch.Tensor]:
    """Return the optional arguments of the model's forward. Only training makes random choices in the model."""
    given = {"document_ids_BT": batch.document_ids, "row_keys_B": batch.row_keys if training else None}
    return {name: value for name, value in given.items() if value is not None}
