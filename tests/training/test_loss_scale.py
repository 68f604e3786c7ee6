"""fp16: the loss scale adapts, skipped steps are counted, and checkpoints store both."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import ROOT, read_metrics, train, update

from stlm.config import load_deepspeed_config
from stlm.errors import ConfigError
from stlm.training.deepspeed import precision
from stlm.training.deepspeed.loss_scale import LossScale
from stlm.training.deepspeed.state_transfer import full_state

FP16 = "training.precision=fp16"


@pytest.fixture
def with_fp16(monkeypatch):
    """Let this CPU claim fp16 support. Without the instructions torch computes the same, slowly."""
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512_fp16"})


def test_the_scale_falls_at_once_and_rises_slowly(monkeypatch):
    monkeypatch.setattr("stlm.training.deepspeed.loss_scale.GROWTH_STEPS", 3)
    scale, values = LossScale(8.0), []
    for overflow in (False, False, True, False, False, False, True, True, True, True):
        scale = scale.after(overflow)
        values.append(scale.value)
    assert values == [8, 8, 4, 4, 4, 8, 4, 2, 1, 1]
    assert scale.overflowed_steps == 5


def test_fp16_is_refused_where_only_software_would_do_it(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512_bf16"})
    with pytest.raises(ConfigError, match=r"training.precision: got fp16, but this CPU has no .*expected auto, fp32"):
        precision.choose_precision("fp16")
    assert precision.choose_precision("auto").name == "bf16"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_overflows_is_skipped(make_trainer, tmp_path, with_fp16, stage):
    """The step changes only the scale; norm and clipping of later steps are those of unscaled gradients."""
    trainer = make_trainer(tmp_path / "run", FP16, "training.max_steps=6", stage=stage)
    reference = make_trainer(tmp_path / "fp32", "training.max_steps=6")
    too_large = LossScale(value=2.0**40)  # beyond what fp16 holds, 65,504
    trainer.engine.loss_scale = too_large
    before = full_state(trainer.engine)
    assert before.updates == 0 and not before.moments
    assert update(trainer) == pytest.approx(update(reference), abs=0.01)
    assert trainer.engine.loss_scale == LossScale(2.0**39, 0, 1)
    after = full_state(trainer.engine).parameters
    assert all(torch.equal(after[name], tensor) for name, tensor in before.parameters.items())

    trainer.engine.loss_scale = trainer.engine.loss_scale._replace(value=2.0**10)
    losses = [update(trainer) for _ in range(5)]
    assert trainer.engine.loss_scale == LossScale(2.0**10, 5, 1)
    assert full_state(trainer.engine).updates == 5
    assert math.isfinite(trainer._figures["gradient_norm"]) and trainer._figures["overflowed_steps"] == 1
    expected = [update(reference) for _ in range(5)]
    assert losses == pytest.approx(expected, abs=0.5)


def test_unscaled_gradients_are_those_of_fp32(make_trainer, tmp_path, with_fp16):
    norms = {}
    for stage in (None, 0, 2, 3):
        settings = (FP16,) if stage is not None else ()
        trainer = make_trainer(tmp_path / str(stage), *settings, "training.gradient_clipping=0.1", stage=stage or 0)
        if stage is not None:
            trainer.engine.loss_scale = LossScale(2.0**8)
        train(trainer, until=1)
        (record,) = read_metrics(tmp_path / str(stage))
        state = full_state(trainer.engine)
        moments = torch.cat([tensor.flatten() for tensor in state.moments["exp_avg"].values()])
        norms[stage] = (record["gradient_norm"], float(moments.norm()))  # a tenth of the clipped gradient
    for stage in (0, 2, 3):
        assert norms[stage] == pytest.approx(norms[None], rel=0.01)
    assert norms[None][1] == pytest.approx(0.01, rel=1e-3)


def test_the_scale_is_resumed(make_trainer, tmp_path, with_fp16, monkeypatch):
    """Equal digit for digit, also before the first update."""
    monkeypatch.setattr("stlm.training.deepspeed.loss_scale.GROWTH_STEPS", 2)  # so that it overflows again later
    for name, until in (("whole", None), ("halves", 6)):
        trainer = make_trainer(tmp_path / name, FP16, stage=2)
        trainer.engine.loss_scale = LossScale(2.0**25, 0, 3)
        train(trainer, until)
        if until:
            saved = trainer.engine.loss_scale
    assert saved.overflowed_steps == 9 and saved.value == 2.0**19  # no update was made yet
    trainer = make_trainer(tmp_path / "halves", FP16, stage=2)
    assert trainer.engine.loss_scale == saved
    train(trainer)
    assert read_metrics(tmp_path / "halves") == read_metrics(tmp_path / "whole")
    assert 9 < trainer.engine.loss_scale.overflowed_steps < 14


def test_a_deepspeed_config_may_state_the_precision(make_trainer, tmp_path):
    """The value auto then takes that precision, which must agree with all other settings."""
    configs = {name: load_deepspeed_config(ROOT / f"ds_configs/{name}.json") for name in ("bf16", "torch_autocast")}
    losses = {}
    for name, config in configs.items():
        trainer = make_trainer(tmp_path / name, "training.precision=auto", deepspeed_config=config)
        assert trainer.engine.precision.name == "bf16"
        assert trainer.engine.config["torch_autocast"]["enabled"] and "bf16" not in trainer.engine.config
        losses[name] = [update(trainer) for _ in range(6)]
    assert losses["torch_autocast"] == pytest.approx(losses["bf16"], abs=1e-2)
    assert losses["torch_autocast"] != losses["bf16"]  # gradients were rounded during communication
    with pytest.raises(ConfigError, match=r"precision: got fp32, but bf16.enabled of the DeepSpeed config says bf16"):
        make_trainer(tmp_path / "other", deepspeed_config=configs["bf16"])
