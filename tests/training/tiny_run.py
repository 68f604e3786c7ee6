"""A tiny run: its config, its training in this process or as ranks, and its outputs."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from data_pipeline.loading.prepared_data import PreparedData
from stlm.config import load_run_config
from stlm.evals import LiveTasks
from stlm.stlm import STLM
from stlm.training import Trainer, build_loaders, build_optimizer
from stlm.training.distributed.ranks import free_port

ROOT = Path(__file__).parents[2]
RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

CONFIG = """
model:
  context_length: 32
  width: 32
  embedder: {kind: byte}
  core: {kind: transformer, num_layers: 2, attention: {num_heads: 2}}
  head: {kind: linear}
training:
  max_steps: 12
  batch_size: 8
  learning_rate: 3e-3
  warmup_steps: 3
  precision: fp32
  log_every_steps: 1
  eval_every_steps: 6
  save_every_steps: 6
"""


def build_trainer(
    config_file, data_dir, run_dir, *overrides, stage=0, resume="auto", deepspeed_config=None, evaluate=None,
    allow_change=False,
):  # fmt: skip
    """Build the trainer that scripts/pretrain.py builds, in this process, on one rank."""
    config = load_run_config(config_file, overrides)
    data = PreparedData.open(data_dir)
    if evaluate is None and config.evals.every_steps:
        evaluate = LiveTasks(config, data)
    model = STLM.from_config(config.model, data.tokenizer, seed=config.seed)
    return Trainer(
        config, model, build_optimizer(model, config.training), *build_loaders(config, data),
        run_dir=run_dir, deepspeed_config=deepspeed_config or {"zero_optimization": {"stage": stage}}, resume=resume,
        allow_change=allow_change, evaluate=evaluate,
    )  # fmt: skip


def train(trainer, until=None):
    """Run the short loop up to a step or to the end, and return the losses."""
    losses = []
    for step in trainer.steps():
        losses.append(trainer.train_step(step))
        trainer.log(step, losses[-1])
        trainer.val_step()
        trainer.save_checkpoint(step)
        if step == until:
            break
    trainer.close()
    return losses


def update(trainer):
    """Make the next update without `steps`, with micro-steps counted from 0, and return its loss."""
    return trainer.train_step((trainer.step + 1) * trainer.grad_accum_steps - 1)


def spawn(command, ranks, more=None):
    """Start `ranks` processes with the environment of a launcher; a single one is started by plain python."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", **(more or {})}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(command, env=environment | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return processes


def read_metrics(run_dir, split=None):
    """Return the records of metrics.jsonl without fields that depend on the clock."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("timing", None)
    return [record for record in records if split in (None, record["split"])]


def wait_for_step(run_dir, step, processes):
    """Return when the run has logged `step`."""
    path = Path(run_dir) / "metrics.jsonl"
    while not path.is_file() or f'"step": {step},' not in path.read_text():
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.002)


def listening(pid):
    """Return the addresses at which a process listens for TCP connections, as ip_address objects, from /proc."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed in the meantime
            inodes.add(os.readlink(link))
    found = []
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:  # LISTEN
                number = bytes.fromhex(words[1].partition(":")[0])  # 32-bit words in the machine's order
                parts = [number[at : at + 4] for at in range(0, len(number), 4)]
                packed = b"".join(part if sys.byteorder == "big" else part[::-1] for part in parts)
                found.append(ipaddress.ip_address(packed))
    return found
