"""The model under evaluation and its data, found from a run, a checkpoint or a model directory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DataError
from data_pipeline.loading.loaders import Data, open_data
from data_pipeline.preparation.options import default_data_dir
from data_pipeline.tokenizers import Tokenizer
from stlm.checkpoints import checkpoints_of, locate_model, run_directory
from stlm.config import DataConfig, load_run_config
from stlm.errors import CheckpointError, StlmError
from stlm.evals.sharding import WHOLE, EvalShard
from stlm.stlm import STLM


@dataclass(frozen=True)
class Subject:
    """A model and, where a task needs them, prepared data made by the same tokenizer."""

    directory: Path  # of the model
    model: STLM
    data: Data | None
    documents_apart: bool  # whether its run kept documents apart: see data.packing
    progress: dict[str, Any]  # state.json of its checkpoint; empty for a model without a checkpoint
    split: str = "validation"  # of the data that tasks read
    shard: EvalShard = WHOLE  # what this rank scores

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        data_dir: str | os.PathLike[str] | None = None,
        with_data: bool = True,
        split: str = "validation",
    ) -> Subject:
        """Load the model, on the GPU if there is one, and open `data_dir`, by default the data of its run.

        `with_data` False: load only the model, for tasks with text of their own. `split`: validation or test.

        Raises StlmError where model and data have different tokenizers, CheckpointError or DataError where one is
        missing or damaged.
        """
        directory = locate_model(path)
        model = STLM.load(directory, device="cuda" if torch.cuda.is_available() else "cpu")
        if not with_data:
            return cls(directory, model, None, False, _read_state(directory))
        data_config = _data_of_run(directory)
        if data_dir:
            data_config = replace(data_config, dir=os.fspath(data_dir), mixture=())
        if data_config.dir is None and not data_config.mixture:
            data_config = replace(data_config, dir=str(default_data_dir(model.tokenizer.spec)))
        try:
            data = open_data(data_config)
        except DataError as error:
            if data_dir or data_config.dir is None or Path(data_config.dir).exists():
                raise
            raise DataError(
                f"{error}; or, if the run was started in another folder than this one, go there, "
                "or name its data by --data"
            ) from error
        if data.tokenizer.fingerprint != model.tokenizer.fingerprint:
            raise StlmError(
                f"{data.dir}: prepared with the tokenizer {_describe(data.tokenizer)}, expected "
                f"{_describe(model.tokenizer)}, that of the model {directory}; choose other data with --data, or "
                "prepare the text with that tokenizer"
            )
        data.split(split)  # raises DataError where it is missing
        return cls(directory, model, data, data_config.packing != "stream", _read_state(directory), split)

    def __str__(self) -> str:
        step = f", step {self.progress['step']:,}" if self.progress else ""
        parameters = f"{self.model.num_parameters():,} parameters"
        model = f"model  {self.directory}{step}, {parameters}, tokenizer {self.model.tokenizer.spec}"
        if self.data is None:
            return model
        lines = [
            model,
            f"data   {self.data.dir} ({', '.join(self._sources(self.data))}), sha256 {self.data.fingerprint}",
        ]
        trained_on = self.progress.get("data_fingerprint", self.data.fingerprint)
        if trained_on != self.data.fingerprint:
            lines.append(f"       differs from the training data, sha256 {trained_on}")
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Return the description of model and data for a JSON file."""
        data = (
            {}
            if self.data is None
            else {
                "data": str(self.data.dir),
                "data_sources": self._sources(self.data),
                "split": self.split,
                "data_fingerprint": self.data.fingerprint,
            }
        )
        return {
            "model": str(self.directory),
            "step": self.progress.get("step"),
            "parameters": self.model.num_parameters(),
            "tokenizer": self.model.tokenizer.spec,
            "tokenizer_fingerprint": self.model.tokenizer.fingerprint,
            **data,
            "trained_on": self.progress.get("data_fingerprint"),
        }

    def _sources(self, data: Data) -> list[str]:
        return [source.name for source in data.sources(self.split)]


def complete_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first. Raises CheckpointError where there is none."""
    found = [path for path in reversed(checkpoints_of(run_dir)) if (path / "COMPLETE").is_file()]
    if not found:
        raise CheckpointError(f"{run_dir}: holds no complete checkpoint; expected a run (checkpoints/step_…/COMPLETE)")
    return found


def _describe(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.spec} ({tokenizer.fingerprint[:12]})"


def _read_state(model: Path) -> dict[str, Any]:
    path = model.parent / "state.json"
    if not path.is_file():
        return {}
    try:
        progress = dict(json.loads(path.read_text(encoding="utf-8")))
        return {**progress, "step": int(progress["step"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); use another checkpoint") from None


def _data_of_run(model: Path) -> DataConfig:
    """Return the data config of the run that holds this model directory: runs/NAME/checkpoints/step_…/model."""
    run_dir = run_directory(model)
    return load_run_config(run_dir).data if (run_dir / "config.yaml").is_file() else DataConfig()
