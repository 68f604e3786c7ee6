"""ZeRO with the optimizer in CPU memory: the same training, and checkpoints that any stage reads and writes."""

from __future__ import annotations

import pytest
from tiny_run import ROOT, read_metrics, train

from stlm.config import load_deepspeed_config


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_does_not_change_training(make_trainer, tmp_path, stage):
    """Equal digit for digit over a resume, and within rounding to the stage without; checkpoints work both ways."""
    offload = {"deepspeed_config": load_deepspeed_config(ROOT / f"ds_configs/zero{stage}-offload.json")}
    expected = train(make_trainer(tmp_path / "plain", stage=stage))
    whole = make_trainer(tmp_path / "whole", **offload)
    assert whole.engine.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert train(whole) == pytest.approx(expected, abs=1e-6)
    train(make_trainer(tmp_path / "halves", **offload), until=6)
    train(make_trainer(tmp_path / "halves", **offload, resume="must"))
    assert read_metrics(tmp_path / "halves") == read_metrics(tmp_path / "whole")
    for name, first, second in (("out", offload, {"stage": 0}), ("in", {"stage": 0}, offload)):
        losses = train(make_trainer(tmp_path / name, **first), until=6)
        losses += train(make_trainer(tmp_path / name, **second, resume="must"))
        assert losses == pytest.approx(expected, abs=1e-6)
