"""Output of a run: metrics.jsonl for programs, TensorBoard for plots, one line for people. Rank 0 only."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data_pipeline.storage.atomic import write_errors_as, write_text, writing
from stlm.errors import CheckpointError
from stlm.training.metrics.wandb_mirror import WandbMirror


class Monitor:
    """Writer of records and log lines to the run directory. Rank 0 opens it; unopened, it writes nothing.

    metrics.jsonl has one line per record, floats with all digits. Values that depend on the clock or the machine are
    under "timing"; all others are independent of interruptions. Methods raise CheckpointError where the disk is full.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._metrics: IO[str] | None = None
        self._log: IO[str] | None = None
        self._writer: Any = None
        self._mirror: WandbMirror | None = None
        self._printing = True

    @write_errors_as(CheckpointError)
    def open(
        self, first_step: int, wandb_config: Mapping[str, Any] | None = None, again: Collection[str] = ()
    ) -> None:  # fmt: skip
        """Open the files. `first_step` is the next step: records of it and of later steps, left by an earlier job, are
        removed, and of the step before it the splits in `again`.

        At first_step 1 the records of step 0 (tasks before the first step) are removed too. With `wandb_config`, the
        settings of the run, records also go to Weights & Biases.
        """
        path = self._run_dir / "metrics.jsonl"
        cut_metrics(path, first_step - 1 if first_step > 1 else -1, again)
        with writing(path):
            self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held until close)
            self._log = open(self._run_dir / "train.log", "a", encoding="utf-8")  # noqa: SIM115
        self._first_step = first_step
        if wandb_config is not None:
            self._mirror = WandbMirror(self._run_dir, wandb_config)

    @write_errors_as(CheckpointError)
    def say(self, text: str) -> None:
        """Print a line, and append it to train.log with the time."""
        if self._log is None:
            return
        if self._printing:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:  # the terminal or the reader of the pipe is gone; train.log has the rest
                self._printing = False
        with writing(self._run_dir / "train.log"):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    @write_errors_as(CheckpointError)
    def record(self, record: dict[str, Any]) -> None:
        """Write a record, which has at least "step" and "split"."""
        if self._metrics is None:
            return
        with writing(self._run_dir / "metrics.jsonl"):
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        with writing(self._run_dir / "tensorboard"):
            for name, number in scalars(record).items():
                self._tensorboard().add_scalar(name, number, record["step"])
        if self._mirror is not None:
            self._mirror.log(scalars(record), record["step"])

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        for file in (self._metrics, self._log, self._writer, self._mirror):
            if file is not None:
                with suppress(OSError):  # a failed write has already raised
                    file.close()
        self._metrics = self._log = self._writer = self._mirror = None

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import: only at the first record

            folder = str(self._run_dir / "tensorboard")
            self._writer = SummaryWriter(folder, purge_step=self._first_step, flush_secs=10)
        return self._writer


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by the names in plots: "train/loss", "evals/corruptions/accuracy"."""

    def walk(path: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            for key, part in value.items():
                yield from walk(path if key == "timing" else f"{path}/{key}", part)
        elif isinstance(value, int | float):
            yield path, value

    return dict(walk(record["split"], {key: value for key, value in record.items() if key not in ("step", "split")}))


def cut_metrics(path: Path, last_step: int, again: Collection[str] = ()) -> None:
    """Keep the records of steps up to `last_step`, except the splits in `again` at that step. Drop unreadable lines,
    such as one cut off when a process was killed."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] < last_step or (record["step"] == last_step and record["split"] not in again):
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def progress_line(record: dict[str, Any], max_steps: int, seconds_left: float) -> str:
    """Format a training record as one line for people."""
    step = f"{record['step']:{len(str(max_steps))}d}/{max_steps}"
    timing = record["timing"]
    mfu = f"mfu {timing['mfu']:.1%}  " if "mfu" in timing else ""
    return (
        f"step {step}  {record['loss']:.4f} nats/id  {record['bits_per_byte']:.4f} bits/byte  "
        f"lr {record['learning_rate']:.2e}  grad {record['gradient_norm']:.3f}  "
        f"{timing['bytes_per_second'] / 1e3:.1f} kB/s  {mfu}{readable_time(seconds_left)} left"
    )


def readable_time(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: "2:05", "1:02:05"; "?" for nan."""
    if math.isnan(seconds):
        return "?"
    whole = math.ceil(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
