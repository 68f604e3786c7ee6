"""A tiny corpus, a tiny run, and processes that train as ranks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.prepare import PrepareConfig, prepare

ROOT = Path(__file__).parents[2]

CONFIG = """
model:
  context_length: 32
  width: 32
  embedder: {kind: byte}
  core: {kind: transformer, num_layers: 2, num_heads: 2}
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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Prepared byte data of about 10 kB, a tenth of it to validate on; neither split fills its last window."""
    directory = tmp_path_factory.mktemp("data")
    draw = random.Random(5)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "thought", "of", "naïve", "fish"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(5, 60))) for _ in range(80)]
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = directory / "prepared"
    prepare(PrepareConfig((str(directory / "text.jsonl"),), output=str(output), workers=1, validation_fraction=0.1))
    return output


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def pretrain(data_dir, config_file):
    """Runs scripts/pretrain.py into a run directory, on one or more ranks, as a launcher would."""

    def run(run_dir, *arguments, ranks=1, stage=0, expect=0, config=config_file):
        processes = start(run_dir, *arguments, ranks=ranks, stage=stage, config=config)
        results = [process.communicate(timeout=240) for process in processes]
        codes = [process.returncode for process in processes]
        output = "\n".join(out + err for out, err in results)
        assert codes == [expect] * ranks, f"exit codes {codes}\n{output}"
        return output

    def start(run_dir, *arguments, ranks=1, stage=0, config=config_file):
        command = [
            sys.executable, str(ROOT / "scripts/pretrain.py"),
            "--ds_config", str(ROOT / f"ds_configs/zero{stage}.json"), "--config", str(config),
            "--data", str(data_dir), "--run", str(run_dir), *arguments,
        ]  # fmt: skip
        return spawn(command, ranks)

    run.start = start
    return run


def spawn(command, ranks):
    """Start `ranks` processes with the environment that a launcher sets; one is started by plain python."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment["OMP_NUM_THREADS"] = "1"
    if ranks > 1:
        from stlm.training.ranks import free_port

        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(command, env=environment | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return processes


RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def read_metrics(run_dir, split=None):
    """The records of metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["timing"]
    return [record for record in records if split in (None, record["split"])]


@pytest.fixture
def make_trainer(data_dir, config_file):
    """Builds what scripts/pretrain.py builds, in this process, on one rank."""
    trainers = []

    def make(run_dir, *overrides, stage=0, resume="auto"):
        from data_pipeline.reader import PreparedData
        from stlm.config import load_run_config
        from stlm.stlm import STLM
        from stlm.training import Trainer, build_loaders, build_optimizer

        config = load_run_config(config_file, overrides)
        data = PreparedData.open(data_dir)
        model = STLM.from_config(config.model, data.tokenizer, seed=config.seed)
        optimizer = build_optimizer(model, config.training)
        zero = {"zero_optimization": {"stage": stage}}
        trainers.append(
            Trainer(
                config, model, optimizer, *build_loaders(config, data),
                run_dir=run_dir, deepspeed_config=zero, resume=resume,
            )
        )  # fmt: skip
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()


def train(trainer, until=None):
    """The short loop, up to a step or to the end; returns the losses."""
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
