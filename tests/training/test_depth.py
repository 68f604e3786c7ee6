"""Training with exits and layers that rows skip: the same for any division of the rows."""

from __future__ import annotations

import pytest
from tiny_run import build_trainer, read_metrics, train

from stlm.stlm import STLM

DEPTH = (
    "model.core.num_layers=4",
    "model.core.exits.every=1",
    "model.core.exits.loss_weight=0.5",
    "model.core.layer_dropout=0.6",
)
LOSSES = ("loss", "exit_1_loss", "exit_2_loss", "exit_3_loss")


@pytest.fixture(scope="module")
def whole(config_file, data_dir, tmp_path_factory):
    """Return the metrics of twelve steps on one rank, with all rows at once."""
    run_dir = tmp_path_factory.mktemp("depth") / "run"
    train(build_trainer(config_file, data_dir, run_dir, *DEPTH))
    return run_dir


def losses(run_dir):
    return [[record[name] for name in LOSSES] for record in read_metrics(run_dir, "train")]


@pytest.mark.parametrize(("stage", "micro_batch_size"), [(0, 1), (3, 4)])
def test_micro_batches_draw_the_same_as_the_whole_batch(make_trainer, whole, tmp_path, stage, micro_batch_size):
    trainer = make_trainer(tmp_path / "run", *DEPTH, f"training.micro_batch_size={micro_batch_size}", stage=stage)
    train(trainer)
    for found, expected in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_two_ranks_that_share_all_weights(pretrain, whole, tmp_path):
    """ZeRO 3: the rows of each rank skip different layers, and yet all ranks run the same modules."""
    pretrain(tmp_path / "run", "--set", *DEPTH, ranks=2, stage=3)
    for found, expected in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    model = STLM.load(tmp_path / "run")
    assert model.depths == (1, 2, 3, 4)


def test_training_improves_the_exits(whole, make_trainer, tmp_path):
    """The loss of the exits falls, and validation runs the whole model, without random draws."""
    first, *_, last = losses(whole)
    assert sum(last[1:]) < 0.7 * sum(first[1:])
    trainer = make_trainer(whole, *DEPTH)
    assert trainer.validate() == trainer.validate()
    assert read_metrics(whole, "validation")[-1]["loss"] == pytest.approx(trainer.validate()[0] / trainer.validate()[1])
