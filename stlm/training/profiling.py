"""Steps recorded by torch's profiler: each rank writes a trace (Perfetto, TensorBoard) and a table to RUN/profile/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from data_pipeline.plurals import number_of
from data_pipeline.storage.atomic import write_errors_as, writing
from stlm.errors import CheckpointError, ConfigError
from stlm.training.trainer import Trainer

OPERATORS = 25  # rows of the table


class Profiler:
    """Recorder of the steps `steps` of a trainer, first and last included; None: no steps. Every rank makes one.

    The caller makes each step inside `step`. Where the run ends earlier, closing writes the steps recorded so far.
    Raises ConfigError if the trainer is past the first of them.
    """

    def __init__(self, trainer: Trainer, steps: tuple[int, int] | None) -> None:
        self._trainer = trainer
        self._steps = steps
        self._profile: profile | None = None
        self._newest = 0
        if steps is not None:
            trainer.distributed.on_rank_zero(self._refuse_past_steps)

    def _refuse_past_steps(self) -> None:
        made, last = self._trainer.step, self._trainer.config.training.max_steps
        assert self._steps is not None
        if made == last:
            raise ConfigError(f"--profile: the run has made its {number_of(last, 'step')}, nothing is left to record")
        if self._steps[0] <= made:
            raise ConfigError(
                f"--profile: got {self._steps[0]}:{self._steps[1]}, but step {made} has been made already; "
                f"{min(made + 2, last)}:{min(made + 4, last)} would work"
            )

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._profile is not None:
            self._write()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number` inside this context, and record it if it is one of `steps`."""
        first, last = self._steps or (0, 0)
        if number == first:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes to stderr when it begins and ends
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
            self._trainer.distributed.stopwatch.annotates = True
        yield
        self._newest = number
        if self._profile is not None and number == last:
            self._write()

    def _write(self) -> None:
        recorded, self._profile = self._profile, None
        assert recorded is not None and self._steps is not None
        recorded.stop()
        self._trainer.distributed.stopwatch.annotates = False
        folder = self._trainer.run_dir / "profile"
        name = f"steps_{self._steps[0]}-{self._newest}.rank_{self._trainer.distributed.rank}"
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with write_errors_as(CheckpointError), writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            table = recorded.key_averages().table(sort_by=order, row_limit=OPERATORS, max_name_column_width=60)
            (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
            recorded.export_chrome_trace(str(folder / f"{name}.pt.trace.json.gz"))
        self._trainer.monitor.say(
            f"profile of steps {self._steps[0]} to {self._newest}: {folder / name}.txt lists the operators; the "
            "trace next to it opens in ui.perfetto.dev or TensorBoard; each rank writes both"
        )
