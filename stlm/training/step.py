"""One training step: read, count, forward, loss, backward, sum of figures, update."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.loading.prepared_data import TrainLoader
from stlm.config import RunConfig
from stlm.model import Output
from stlm.objectives import Batch, Loss, Objective
from stlm.stlm import STLM
from stlm.training.deepspeed.engine import Engine
from stlm.training.loaders import batch_of
from stlm.training.metrics.throughput import Throughput
from stlm.training.optim.schedules import learning_rate_at
from stlm.training.optim.straight_through import rounded
from stlm.training.recovery import nan_gradient_unless_finite


class StepResult(NamedTuple):
    """Outcome of a step: sums over its rows on all ranks, and the gradient's norm before clipping."""

    nats: float  # negative log-likelihood of the predicted ids
    ids: float  # predicted ids
    bytes: float  # of text that these ids stand for
    terms: dict[str, float]  # further terms of the loss by name, in nats
    measures: dict[str, float]  # measured ratios by name
    gradient_norm: float
    learning_rate: float
    own_losses: list[float]  # of this rank's micro-batches, in nats, with all terms

    @property
    def loss(self) -> float:
        """Nats per id, without further terms."""
        return self.nats / self.ids

    @property
    def total_loss(self) -> float:
        """Nats per id with all terms: the function whose gradient was taken."""
        return math.fsum((self.nats, *self.terms.values())) / self.ids

    @property
    def is_finite(self) -> bool:
        """True if the step made an update."""
        return math.isfinite(self.total_loss) and math.isfinite(self.gradient_norm)


class TrainingStep:
    """Steps of a model on its engine. All ranks call each step."""

    def __init__(
        self, config: RunConfig, model: STLM, engine: Engine, objective: Objective, loader: TrainLoader,
        throughput: Throughput,
    ) -> None:  # fmt: skip
        self.config = config
        self.model = model
        self.engine = engine
        self.distributed = engine.distributed
        self.objective = objective
        self.loader = loader
        self.throughput = throughput
        self.bytes_per_id = torch.from_numpy(model.tokenizer.bytes_per_id).to(engine.device)

    def __call__(self, step: int, used_up: float) -> StepResult:
        """Make update `step`. `used_up`: fraction of the run that ends with it.

        No update is made where the loss or the gradient is not finite.
        """
        training, phase = self.config.training, self.distributed.stopwatch.phase

        with phase("data"):
            batches = self.read(step)
        # Every id has the same weight, however the rows are divided: the sums are divided by the count of all ranks.
        counts = torch.stack([batch.counts(self.bytes_per_id) for batch in batches]).sum(0)
        ids, bytes = self.distributed.sum_over_ranks(counts.tolist())

        self.engine.train()
        parts = []
        # The weights are rounded in the last `quantization_steps` of a run only.
        with rounded(self.model, training, used_up), self.engine.accumulate():
            for batch in batches:
                with phase("forward"):
                    output = self.forward(batch)
                    nats, own_terms = self.objective.loss(output, batch)
                    terms = {**output.auxiliary, **own_terms}  # of the model, such as balanced experts, and its own
                    loss = nan_gradient_unless_finite(sum(terms.values(), nats) / ids)
                self.engine.backward(loss, last=batch is batches[-1])
                parts.append(named_sums(Loss(nats, terms), output))

        sums, own_losses = self.sum_figures(parts)
        learning_rate = learning_rate_at(step, training, used_up)
        gradient_norm = self.engine.step(learning_rate)
        return StepResult(
            nats=sums["nats", ""],
            ids=ids,
            bytes=bytes,
            terms={name: value for (what, name), value in sums.items() if what == "term"},
            measures={name: value / sums["count", name] for (what, name), value in sums.items() if what == "total"},
            gradient_norm=gradient_norm,
            learning_rate=learning_rate,
            own_losses=own_losses,
        )

    def read(self, step: int) -> list[Batch]:
        """Return this rank's rows of a step as micro-batches on the device, prepared for the objective."""
        split = self.engine.split
        first = self.distributed.rank * split.rows
        batch = batch_of(self.loader.rows(step, first, first + split.rows), self.config.seed, step, first)
        batch = batch.map(lambda tensor: tensor.to(self.engine.device))
        starts = range(0, split.rows, split.micro_batch_size)
        return [self.objective.prepare(batch.rows(start, start + split.micro_batch_size)) for start in starts]

    def forward(self, batch: Batch) -> Output:
        """Return the model's output. The first forward pass of a job also counts its FLOPs."""
        options = batch.options(training=True)
        if self.engine.compiled.on and not self.throughput.has_counted:
            with torch.no_grad(), self.throughput.counting():  # a compiled program hides its matrix products
                self.model.forward(batch.ids, **options)
            output = self.engine.forward(batch.ids, **options)
            if not self.engine.compiled.settle(self.distributed):
                output = self.engine.forward(batch.ids, **options)
            return output
        with self.throughput.counting():
            return self.engine.forward(batch.ids, **options)

    def sum_figures(
        self, parts: list[dict[tuple[str, str], Tensor]]
    ) -> tuple[dict[tuple[str, str], float], list[float]]:
        """Return each sum over all micro-batches of all ranks, and the loss of each micro-batch of this rank."""
        names = sorted(parts[0])  # the same in every forward pass
        rows = torch.stack([torch.stack([part[name].detach().double() for name in names]) for part in parts]).tolist()
        totals = self.distributed.sum_over_ranks([math.fsum(column) for column in zip(*rows, strict=True)])
        in_loss = [place for place, (what, _) in enumerate(names) if what in ("nats", "term")]
        return dict(zip(names, totals, strict=True)), [math.fsum(row[place] for place in in_loss) for row in rows]


def named_sums(loss: Loss, output: Output) -> dict[tuple[str, str], Tensor]:
    """Return the sums of a micro-batch by what they are: nats, terms of the loss, totals and counts of measures."""
    sums = {("nats", ""): loss.nats}
    sums |= {("term", name): nats for name, nats in loss.terms.items()}
    for name, (total, count) in output.measures.items():
        sums |= {("total", name): total, ("count", name): count}
    return sums
