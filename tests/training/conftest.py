"""A tiny corpus, and fixtures that train on it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from tiny_run import CONFIG, ROOT, build_trainer, spawn

from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Prepare byte data of about 10 kB, a tenth of it for validation; neither split fills its last window."""
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
    """Return an object that runs scripts/pretrain.py into a run directory, on one or more ranks, like a launcher."""

    def run(run_dir, *arguments, expect=0, ranks=1, **options):
        processes = start(run_dir, *arguments, ranks=ranks, **options)
        results = [process.communicate(timeout=240) for process in processes]
        codes = [process.returncode for process in processes]
        output = "\n".join(out + err for out, err in results)
        assert codes == [expect] * ranks, f"exit codes {codes}\n{output}"
        return output

    def start(run_dir, *arguments, ranks=1, stage=0, config=config_file, environment=None):
        command = [
            sys.executable, str(ROOT / "scripts/pretrain.py"),
            "--ds_config", str(ROOT / f"ds_configs/zero{stage}.json"), "--config", str(config),
            "--data", str(data_dir), "--run", str(run_dir), *arguments,
        ]  # fmt: skip
        return spawn(command, ranks, environment)

    run.start = start
    return run


@pytest.fixture
def make_trainer(data_dir, config_file):
    """Return a function that builds trainers in this process, and release their resources at the end."""
    trainers = []

    def make(run_dir, *overrides, **options):
        trainers.append(build_trainer(config_file, data_dir, run_dir, *overrides, **options))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()
