"""torch.compile with the engine: the same training and parameter names; refused where it cannot work."""

from __future__ import annotations

import pytest
from tiny_run import train
from torch._dynamo.utils import counters

from stlm.errors import ConfigError, EngineError
from stlm.stlm import STLM
from stlm.training.run.checkpoint import read_state

COMPILE = "training.compile=true"


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(make_trainer, tmp_path):
    """The checkpoint resumes without a compiler. All layers share one compiled program."""
    short = (
        "model.core.num_layers=3",
        "training.max_steps=8",
        "training.eval_every_steps=8",
        "training.save_every_steps=4",
    )
    expected = train(make_trainer(tmp_path / "eager", *short))
    counters.clear()
    compiled = make_trainer(tmp_path / "compiled", *short, COMPILE, "training.activation_checkpointing=true", stage=2)
    losses = train(compiled, until=4) + train(make_trainer(tmp_path / "compiled", *short))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[:4] != expected[:4]  # it ran another program
    found, eager = (read_state(tmp_path / name / "checkpoints/step_00000004") for name in ("compiled", "eager"))
    assert list(found.parameters) == list(eager.parameters)
    STLM.load(tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 1, "the layers are alike, so they share one program"


def test_compilation_is_refused_where_it_cannot_work(make_trainer, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"training.compile: got true with ZeRO stage 3"):
        make_trainer(tmp_path / "3", COMPILE, stage=3)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(EngineError, match="TORCHDYNAMO_DISABLE=1 in the environment turns it off"):
        make_trainer(tmp_path / "off", COMPILE)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(EngineError, match=r"no C\+\+ compiler .*; install g\+\+"):
        make_trainer(tmp_path / "none", COMPILE)
