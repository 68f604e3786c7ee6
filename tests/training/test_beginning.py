"""A run that begins with a model made elsewhere."""

import pytest
import torch
from tiny_run import build_trainer, train

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import load_run_config
from stlm.errors import CheckpointError
from stlm.stlm import STLM
from stlm.training.run.run_directory import begin_run


@pytest.fixture
def begun(config_file, tmp_path):
    """Make a model with values of its own, and a run that begins with it."""
    config = load_run_config(config_file)
    model = STLM.from_config(config.model, build_tokenizer("byte"), seed=99)
    begin_run(config, model, tmp_path / "run")
    return model


def test_training_continues_from_the_model(begun, data_dir, tmp_path):
    trainer = build_trainer(tmp_path / "run", data_dir, tmp_path / "run", "training.max_steps=2", resume="must")
    held = dict(trainer.model.named_parameters())
    assert trainer.step == 0
    assert all(torch.equal(held[name], tensor) for name, tensor in begun.named_parameters())
    losses = train(trainer)
    assert len(losses) == 2
    assert not torch.equal(STLM.load(tmp_path / "run").embedder.table.weight, begun.embedder.table.weight)


def test_data_of_another_tokenizer_are_refused(begun, data_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(begun.tokenizer, "fingerprint", "f" * 64)
    begin_run(load_run_config(tmp_path / "run"), begun, tmp_path / "other")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        build_trainer(tmp_path / "other", data_dir, tmp_path / "other")
