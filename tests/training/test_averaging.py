"""The weight average: its definition, its use for validation and checkpoints, and its survival of every resume."""

from __future__ import annotations

import pytest
import torch
from tiny_run import read_metrics, train

from stlm.errors import CheckpointError
from stlm.stlm import STLM
from stlm.training.run.checkpoint import read_state

AVERAGED = "training.ema_decay=0.9"
LAST = "checkpoints/step_00000012"


@pytest.fixture(scope="module")
def runs(data_dir, config_file, tmp_path_factory):
    """Run with and without an average; return the averages and weights after each step, computed by hand."""
    from tiny_run import build_trainer

    root = tmp_path_factory.mktemp("averaging")
    train(build_trainer(config_file, data_dir, root / "plain"))
    trainer = build_trainer(config_file, data_dir, root / "averaged", AVERAGED)
    average: dict[str, torch.Tensor] = {}
    for step in trainer.steps():
        trainer.log(step, trainer.train_step(step))
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in trainer.model.named_parameters():
            before = average.get(name, parameter.detach())
            average[name] = decay * before + (1 - decay) * parameter.detach()
        trainer.val_step()
        trainer.save_checkpoint(step)
    return root, average


def test_a_checkpoint_holds_the_average_as_its_model(runs):
    """Checkpoints hold it as the model; trained weights are stored with the moments, equal to those without it."""
    root, average = runs
    model = dict(STLM.load(root / "averaged").named_parameters())
    state, plain = (read_state(root / name / LAST) for name in ("averaged", "plain"))
    for name, expected in average.items():
        assert torch.allclose(model[name], expected, atol=1e-6)
        assert torch.equal(state.moments["ema"][name], model[name])
        assert torch.equal(state.parameters[name], plain.parameters[name])
        assert not torch.equal(state.parameters[name], model[name])
    assert sorted(state.moments) == ["ema", "exp_avg", "exp_avg_sq"]


def test_the_average_is_validated_and_training_is_unaffected(runs):
    root, _ = runs
    losses = [[record["loss"] for record in read_metrics(root / name, "train")] for name in ("plain", "averaged")]
    assert losses[0] == losses[1]
    bits = [[r["bits_per_byte"] for r in read_metrics(root / name, "validation")] for name in ("plain", "averaged")]
    assert all(abs(first - second) > 1e-3 for first, second in zip(*bits, strict=True))


def test_a_model_in_training_scores_as_its_checkpoint_does(make_trainer, runs, tmp_path):
    root, _ = runs
    expected = read_metrics(root / "averaged", "validation")[-1]["bits_per_byte"]
    plain = make_trainer(tmp_path / "plain")
    plain.model.load_state_dict(STLM.load(root / "averaged").state_dict())
    nats, _, bytes = plain.validate()
    assert nats / bytes / torch.log(torch.tensor(2.0)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("stages", [(0, 0), (2, 2), (3, 3), (0, 3), (1, 2), (3, 0)])
def test_the_average_survives_a_resume(make_trainer, runs, tmp_path, stages):
    root, _ = runs
    for stage, until in zip(stages, (6, None), strict=True):
        trainer = make_trainer(tmp_path / "run", AVERAGED, stage=stage)
        train(trainer, until)
    found, expected = read_metrics(tmp_path / "run"), read_metrics(root / "averaged")
    for record, other in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], abs=0 if stages == (0, 0) else 1e-6)
        assert record["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=0 if stages == (0, 0) else 1e-6)
    state, other = (read_state(run / LAST) for run in (tmp_path / "run", root / "averaged"))
    for name, average in other.moments["ema"].items():
        assert torch.allclose(state.moments["ema"][name], average, atol=1e-5)


@pytest.mark.slow
def test_two_ranks_have_the_same_average(pretrain, runs, tmp_path):
    root, _ = runs
    for stage in (2, 3):
        pretrain(tmp_path / f"run{stage}", "--set", AVERAGED, ranks=2, stage=stage)
        found, expected = read_metrics(tmp_path / f"run{stage}"), read_metrics(root / "averaged")
        for record, other in zip(found, expected, strict=True):
            assert record["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=2e-6)


def test_a_checkpoint_of_another_optimizer_is_refused(make_trainer, runs, tmp_path):
    root, _ = runs
    trainer = make_trainer(tmp_path / "run", "training.optimizer=muon")
    with pytest.raises(CheckpointError, match="holds exp_avg and exp_avg_sq, but this optimizer keeps momentum"):
        trainer.load_checkpoint(root / "plain" / LAST)
    with pytest.raises(CheckpointError, match="holds ema and exp_avg and exp_avg_sq"):
        make_trainer(tmp_path / "other").load_checkpoint(root / "averaged" / LAST)
