"""The last phase of a run whose model will be packed: gradients of rounded matrices update the exact ones."""

import copy

import pytest
import torch
from tiny_run import build_trainer, update

from stlm.config import TrainingConfig, load_run_config
from stlm.errors import ConfigError
from stlm.model.decoding.quantization import round_to_nearest
from stlm.training import build_optimizer
from stlm.training.loaders import batch_of
from stlm.training.optim.schedules import learning_rate_at
from stlm.training.optim.straight_through import check_stage, rounded

LAST_TWO = TrainingConfig(max_steps=10, quantization_bits=4, quantization_steps=2)
OVERRIDES = ("training.quantization_bits=4", "training.quantization_steps=12")


def test_matrices_are_rounded_inside_and_exact_again_outside():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with rounded(model, LAST_TWO, used_up=0.8):
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    with pytest.raises(RuntimeError, match="in the middle"), rounded(model, LAST_TWO, used_up=0.9):
        for name, parameter in model.named_parameters():
            value = round_to_nearest(before[name], 4).value() if parameter.ndim > 1 else before[name]
            torch.testing.assert_close(parameter.detach(), value)
            assert torch.equal(parameter, before[name]) == (parameter.ndim == 1)
        raise RuntimeError("in the middle")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_is_that_of_plain_torch(config_file, data_dir, stage, tmp_path):
    trainer = build_trainer(config_file, data_dir, tmp_path / "run", *OVERRIDES, "training.batch_size=4", stage=stage)
    training, exact = trainer.config.training, copy.deepcopy(trainer.model)
    nearest = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in nearest.parameters():
            if parameter.ndim > 1:
                parameter.copy_(round_to_nearest(parameter, 4).value())
    rows = batch_of(trainer.train_loader.rows(1, 0, 4), seed=1, step=1, first=0)
    logits_BTV = nearest(rows.ids).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV[rows.loss_mask], rows.ids[rows.loss_mask])
    loss.backward()
    optimizer = build_optimizer(exact, training)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(1, training)
    for parameter, other in zip(exact.parameters(), nearest.parameters(), strict=True):
        parameter.grad = other.grad
    torch.nn.utils.clip_grad_norm_(exact.parameters(), training.gradient_clipping)
    optimizer.step()

    assert update(trainer) == pytest.approx(loss.item(), rel=1e-5)
    for parameter, expected in zip(trainer.model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), expected.detach(), atol=2e-6, rtol=1e-5)
    trainer.close()


def test_ranks_that_hold_parts_of_matrices_are_refused():
    check_stage(LAST_TWO, 2)
    check_stage(TrainingConfig(), 3)
    with pytest.raises(ConfigError, match=r"quantization_bits: got 4 with ZeRO stage 3, .*zero2\.json would work"):
        check_stage(LAST_TWO, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("quantization_bits=5", "quantization_steps=2"), "quantization_bits: got 5, expected 8, 6, 4 or null"),
        (("quantization_steps=2",), "quantization_steps: got 2, which has no effect"),
        (("quantization_bits=4",), r"quantization_steps: got 0, expected 1 to training\.max_steps = 12"),
        (("quantization_bits=4", "quantization_steps=13"), "quantization_steps: got 13"),
    ],
)
def test_contradictory_settings_are_refused(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(config_file, [f"training.{override}" for override in overrides])
