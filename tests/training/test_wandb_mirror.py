"""The Weights & Biases mirror, with a module of that name that records its calls."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from stlm.errors import CheckpointError, ConfigError
from stlm.training.metrics.monitor import scalars

FAKE = """
calls = []
class Error(Exception): pass
class Settings:
    def __init__(self, **settings): pass
class Run:
    def log(self, numbers, step): calls.append(("log", step, numbers))
    def finish(self): calls.append(("finish",))
def init(**options):
    calls.append(("init", options))
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def train(trainer):
    for step in trainer.steps():
        trainer.log(step, trainer.train_step(step))
        trainer.val_step()
        trainer.save_checkpoint(step)
    trainer.close()


def test_it_receives_the_records_of_the_metrics(make_trainer, tmp_path, wandb):
    run = tmp_path / "run"
    train(make_trainer(run, "training.wandb=true", "training.max_steps=2"))
    (_, options), *logged, last = wandb.calls
    assert (options["name"], options["mode"], options["dir"]) == ("run", "offline", str(run))
    assert options["config"]["training"]["max_steps"] == 2
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == [("log", record["step"], scalars(record)) for record in records]
    assert logged and last == ("finish",)

    train(make_trainer(run, "training.wandb=true", "training.max_steps=3"))
    again = [call[1] for call in wandb.calls if call[0] == "init"][1]
    assert (again["id"], again["resume"]) == (options["id"], "allow")


def test_the_environment_chooses_the_mode(make_trainer, tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    make_trainer(tmp_path / "run", "training.wandb=true")
    assert wandb.calls[0][1]["mode"] == "online"


def test_without_the_setting_it_is_not_called(make_trainer, tmp_path, wandb):
    train(make_trainer(tmp_path / "run", "training.max_steps=1"))
    assert wandb.calls == []


def test_its_errors_are_reported(make_trainer, tmp_path, wandb, monkeypatch):
    def fail(*_, **__):
        raise wandb.Error("no room")

    trainer = make_trainer(tmp_path / "run", "training.wandb=true")
    monkeypatch.setattr(wandb.Run, "log", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*wandb: no room; training\.wandb=false"):
        trainer.monitor.record({"step": 1, "split": "train", "loss": 1.0})


def test_a_missing_module_is_reported_before_training(make_trainer, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"-m pip install '?wandb\b") as raised:
        make_trainer(tmp_path / "run", "training.wandb=true")
    assert raised.value.exit_code == 2
    assert not (tmp_path / "run").exists()
