"""Tasks that evaluate a model during training, and the scalars of their results that are logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loading.loaders import Data
from stlm.config import RunConfig
from stlm.evals.registry import Options, load_tasks
from stlm.evals.report import headline
from stlm.evals.sharding import WHOLE, EvalShard
from stlm.evals.subject import Subject
from stlm.stlm import STLM


class LiveTasks:
    """The tasks of a run's section `evals`, each rank scoring its shard of the items.

    A call takes a step and the weights by name, whole and in fp32, and returns the scalars and a line to print. The
    scalars equal those of `scripts/evaluate.py` on the checkpoint of that step: the weights are copied into a separate
    model, evaluated in fp32, so that the model in training is not touched. The copy is kept between calls.

    The constructor raises StlmError or DataError where a name is unknown or items are missing or break their schema.
    """

    def __init__(self, config: RunConfig, data: Data, shard: EvalShard = WHOLE) -> None:
        options = Options(config.evals.tasks_dir, items=config.evals.items)
        self._tasks = load_tasks(config.evals.tasks, options, "evals.tasks")
        self._config = config
        self._data = data
        self._shard = shard
        self._model: STLM | None = None

    def __call__(self, step: int, weights: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Any], str]:
        model = self._copy(weights)
        apart = self._config.data.packing != "stream"
        subject = Subject(Path(), model, self._data, apart, {"step": step}, shard=self._shard)
        results = {name: task(subject).values for name, task in self._tasks.items()}
        line = "  ".join(f"{name} {headline(values)}{_sample_note(values)}" for name, values in results.items())
        return {name: scalars(values) for name, values in results.items()}, line

    @torch.no_grad()
    def _copy(self, weights: Iterable[tuple[str, Tensor]]) -> STLM:
        for name, tensor in weights:
            if self._model is None:
                self._model = STLM(self._config.model, self._data.tokenizer).to(tensor.device).eval()
            self._model.get_parameter(name).copy_(tensor)
        assert self._model is not None, "a model without weights"
        return self._model


def _sample_note(values: Mapping[str, Any]) -> str:
    """Return the number of scored items as text; empty if the task was scored whole."""
    return f" ({values['items']:,} of {values['sampled_from']:,} items)" if "sampled_from" in values else ""


def scalars(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a task's result: estimates with their bounds (accuracy, accuracy_low, accuracy_high), the
    accuracy of each group by kind and name, and the bits per byte of each source."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and {"value", "low", "high"} == value.keys():
            bounds = {f"{key}_{bound}": value[bound] for bound in ("low", "high") if value[bound] is not None}
            found |= {key: value["value"], **bounds}
        elif key == "groups":
            found |= {
                kind: {name: part["accuracy"]["value"] for name, part in of.items()} for kind, of in value.items()
            }
        elif key == "sources":
            found[key] = {name: part["bits_per_byte"] for name, part in value.items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = value
    return found
