"""Mirror of a run's TensorBoard scalars at Weights & Biases. Offline unless WANDB_MODE says otherwise."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.extras import how_to_install
from data_pipeline.storage.atomic import write_errors_as, writing
from stlm.errors import CheckpointError, ConfigError


def check_wandb() -> None:
    """Raise ConfigError where wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"training.wandb: got true, but wandb is not installed: {how_to_install('wandb')}; or training.wandb=false"
        )


class WandbMirror:
    """One run of Weights & Biases in RUN/wandb. All methods except close raise CheckpointError where writing fails."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._folder = run_dir / "wandb"
        self._error: type[Exception] = wandb.Error
        with self._telling():
            self._run = wandb.init(
                project="stlm",
                name=run_dir.resolve().name,
                id=hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:16],  # the same at every resume
                resume="allow",
                dir=str(run_dir),
                mode=os.environ.get("WANDB_MODE") or "offline",
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),  # what is printed is in train.log
            )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log `numbers` at `step`."""
        with self._telling():
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Write what is left. Errors are ignored, so that a run does not fail at its end."""
        with suppress(OSError, self._error):
            self._run.finish()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            with write_errors_as(CheckpointError), writing(self._folder):
                yield
        except self._error as error:
            raise CheckpointError(f"cannot write {self._folder}: {error}; training.wandb=false does without") from error
