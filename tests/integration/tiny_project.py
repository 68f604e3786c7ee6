"""A tiny run in a copy of the project, and its outputs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CONFIG = """
model:
  context_length: 32
  width: 32
  embedder: {kind: byte}
  core: {kind: transformer, num_layers: 1}
training:
  max_steps: 300
  batch_size: 8
  learning_rate: 3e-3
  warmup_steps: 3
  precision: fp32
  log_every_steps: 1
  eval_every_steps: 300
  save_every_steps: 300
"""

# Arguments of scripts/pretrain.py, run in the project's folder.
OPTIONS = ("--ds_config", "ds_configs/zero2.json", "--config", "tiny.yaml", "--data", "data/tiny")


def read_metrics(run: Path) -> list[dict]:
    """Return the records of metrics.jsonl without fields that depend on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "timing"} for record in records]


def wait_for_step(run: Path, step: int, check: Callable[[], None] = lambda: None, timeout_s: float = 120) -> None:
    """Return when the run has logged `step`; `check` is called regularly, and raises if the step cannot come."""
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + timeout_s
    while not path.is_file() or f'"step": {step},' not in path.read_text():
        check()
        assert time.monotonic() < deadline, f"{run} did not reach step {step}"
        time.sleep(0.02)


def processes_with(word: str) -> list[str]:
    """Return the command lines of all processes of this machine that contain `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in line:
                found.append(line)
    return found
