"""Loss terms of model parts and objective: logged, and the same for any division of the rows."""

from __future__ import annotations

import math

import pytest
from tiny_run import read_metrics, train

EXPERTS = "model.core.feed_forward={kind: moe, num_experts: 3, hidden_width: 16, balance_weight: 0.5}"
VALUES = "model.core.attention.value_residual=true"
SCALE = "model.core.residual.learned_scale=true"


def records(make_trainer, run_dir, *overrides, stage=0):
    trainer = make_trainer(run_dir, EXPERTS, VALUES, SCALE, "training.max_steps=3", *overrides, stage=stage)
    train(trainer)
    return read_metrics(run_dir, "train")


def test_loss_terms_do_not_depend_on_how_rows_are_divided(make_trainer, tmp_path):
    z = "training.z_loss_weight=1e-2"
    whole = records(make_trainer, tmp_path / "whole", z)
    parts = records(make_trainer, tmp_path / "parts", z, "training.micro_batch_size=2", stage=3)
    for name in ("loss", "z_loss", "balance_loss", "gradient_norm"):
        assert [r[name] for r in parts] == pytest.approx([r[name] for r in whole], rel=1e-4), name
    assert whole[0]["z_loss"] == pytest.approx(1e-2 * math.log(256) ** 2, rel=0.05)  # a first guess is uniform
    # Two layers of 0.5 each if the experts were used equally; counted for each id of a row, with padding.
    assert 1.0 <= whole[0]["balance_loss"] < 1.5
    without = records(make_trainer, tmp_path / "without")
    assert "z_loss" not in without[0] and without[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6)
    assert without[0]["gradient_norm"] != pytest.approx(whole[0]["gradient_norm"], rel=1e-6)
