"""torch.compile under the engine: when it pays, the same training under the same names, failures."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_run import train
from torch import nn
from torch._dynamo.utils import counters

from stlm.config import load_run_config
from stlm.errors import ConfigError, EngineError
from stlm.stlm import STLM
from stlm.training import compilation, opening
from stlm.training.compilation import Choice, choose
from stlm.training.run.checkpoint import read_state

COMPILE = "training.compile=true"
COMPILED = Choice(True, "a test says so")
SHORT = (
    "model.core.num_layers=3",
    "training.max_steps=8",
    "training.eval_every_steps=8",
    "training.save_every_steps=4",
)


@pytest.fixture
def log(tmp_path):
    return lambda name: (tmp_path / name / "train.log").read_text()


@pytest.fixture
def fake(monkeypatch):
    """Let auto decide as told, and let torch run `backend` in place of its compiler."""

    def set_up(backend=lambda block: block, choice=COMPILED):
        monkeypatch.setattr(opening, "choose", lambda *_: choice)
        monkeypatch.setattr(torch, "compile", lambda call, **_: backend(call))

    return set_up


def no_compiler():
    raise RuntimeError("no working compiler found")


def saved(run_dir, step):
    return json.loads((run_dir / f"checkpoints/step_{step:08d}" / "state.json").read_text())["compiled"]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(make_trainer, tmp_path):
    """The checkpoint resumes without a compiler. All layers share one compiled program."""
    expected = train(make_trainer(tmp_path / "eager", *SHORT))
    counters.clear()
    compiled = make_trainer(tmp_path / "compiled", *SHORT, COMPILE, "training.activation_checkpointing=true", stage=2)
    losses = train(compiled, until=4)
    assert counters["stats"]["unique_graphs"] == 1, "the layers are alike, so they share one program"
    assert counters["stats"]["calls_captured"] > 20, "a whole block"
    losses += train(make_trainer(tmp_path / "compiled", *SHORT, "training.compile=false"))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[:4] != expected[:4]  # it ran another program
    found, eager = (read_state(tmp_path / name / "checkpoints/step_00000004") for name in ("compiled", "eager"))
    assert list(found.parameters) == list(eager.parameters)
    STLM.load(tmp_path / "compiled")


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_written(make_trainer, tmp_path, monkeypatch, log):
    monkeypatch.setattr(opening, "choose", lambda *_: COMPILED)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/cache"))
    torch._dynamo.reset()
    assert train(make_trainer(tmp_path / "auto", *SHORT)) == train(
        make_trainer(tmp_path / "eager", *SHORT, "training.compile=false")
    )
    assert "warning: blocks are no longer compiled" in log("auto")


def test_where_it_cannot_work(make_trainer, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"training.compile: got true, but ZeRO stage 3"):
        make_trainer(tmp_path / "3", COMPILE, stage=3)
    block = nn.Linear(1, 1)
    assert choose(1e9, block, stage=3).reason.startswith("ZeRO stage 3")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(EngineError, match="TORCHDYNAMO_DISABLE=1 in the environment turns it off"):
        make_trainer(tmp_path / "off", COMPILE)
    assert not choose(1e9, block, stage=0).compiles
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    with pytest.raises(EngineError, match=r"no C\+\+ compiler .*: install g\+\+.*training.compile=false"):
        make_trainer(tmp_path / "none", COMPILE)
    assert "no C++ compiler" in choose(1e9, block, stage=0).reason
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: (tmp_path / "none/at/all").mkdir())
    assert "cannot use its cache folder" in choose(1e9, block, stage=0).reason


def test_auto_compiles_where_the_gain_is_clearly_larger(make_trainer, tmp_path, monkeypatch):
    """A measurement is made only where a run is long enough."""
    model = make_trainer(tmp_path / "run").model
    costs = []
    monkeypatch.setattr(compilation, "compilation_seconds", lambda kinds: costs.append(kinds) or 100.0 * kinds)
    assert not choose(600.0, model, stage=0).compiles
    assert costs == []
    monkeypatch.setattr(compilation, "_obstacle", lambda stage: None)
    assert not choose(2400.0, model, stage=0).compiles  # gains 288 s
    assert choose(2600.0, model, stage=0).compiles  # gains 312 s
    assert costs == [1, 1], "the layers are alike"
    monkeypatch.setattr(compilation, "compilation_seconds", lambda kinds: None)
    assert choose(1e9, model, stage=0) == Choice(False, "the C++ compiler fails on a small program")


def test_the_cost_is_that_of_the_compiler(monkeypatch):
    assert compilation.compilation_seconds(1) > 0
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "false")
    assert compilation.compilation_seconds(1) is None
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "no-such-compiler")
    assert compilation.compilation_seconds(1) is None


def test_how_long_a_run_is(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run")

    def seconds(*overrides):
        training = load_run_config("quickstart", ["training.batch_size=8", *overrides]).training
        return opening.training_seconds(training, trainer.model, trainer.engine, peak=1e9)

    whole = seconds("training.max_steps=1000")
    assert whole == pytest.approx(2 * seconds("training.max_steps=500"))
    # 2 FLOPs a parameter of a matrix and id, 3 passes; attention adds little. Half the peak.
    assert whole == pytest.approx(1000 * 8 * 32 * 6 * 33_000 / 0.5e9, rel=0.3)
    assert seconds("training.max_steps=1000", "training.limits.ids=25600") == pytest.approx(whole / 10)
    assert seconds("training.max_steps=1000", "training.limits.bytes=25600") == pytest.approx(whole / 10, rel=0.1)
    assert seconds("training.max_steps=1000", "training.limits.wall_time_s=0.01") == 0.01
    assert trainer.model.training


def test_the_choice_is_kept(make_trainer, tmp_path, fake, log):
    """A resumed run compiles if it did so before, whatever auto would decide now."""
    calls = []
    fake(lambda call: lambda *inputs, **named: calls.append(1) or call(*inputs, **named))
    expected = train(make_trainer(tmp_path / "run", *SHORT), until=4)
    assert calls and "compiled: a test says so" in log("run") and saved(tmp_path / "run", 4) is True
    fake(choice=Choice(False, "a test says so"))
    resumed = make_trainer(tmp_path / "run", *SHORT)
    assert resumed.engine.compiled.on and "compiled, as before" in log("run")
    expected += train(resumed)
    eager = make_trainer(tmp_path / "eager", *SHORT)
    assert train(eager, until=4) == expected[:4] and "not compiled: a test says so" in log("eager")
    fake()
    resumed = make_trainer(tmp_path / "eager", *SHORT)
    assert not resumed.engine.compiled.on
    assert train(resumed) == expected[4:] and saved(tmp_path / "eager", 8) is False


def test_a_compiler_that_is_gone_at_the_resume(make_trainer, tmp_path, monkeypatch, fake):
    fake()
    train(make_trainer(tmp_path / "run", *SHORT), until=4)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    with pytest.raises(EngineError, match=r"was compiled up to step 4.* no C\+\+ compiler .*training.compile=false"):
        make_trainer(tmp_path / "run", *SHORT)
    train(make_trainer(tmp_path / "run", *SHORT, "training.compile=false"))
    assert saved(tmp_path / "run", 8) is False


@pytest.mark.parametrize("stage", [0, 2])
def test_a_broken_compiler(make_trainer, tmp_path, fake, log, stage):
    """Auto trains without, from the first step on; true is an error, and so is a run compiled before."""

    def broken(call):
        def fail(*inputs, **named):
            call(*inputs, **named)
            raise RuntimeError("C++ compile error\n\nmany lines")

        return fail

    expected = train(make_trainer(tmp_path / "eager", *SHORT, "training.compile=false", stage=stage))
    fake(broken)
    assert train(make_trainer(tmp_path / "auto", *SHORT, stage=stage)) == expected
    assert saved(tmp_path / "auto", 8) is False
    line = "warning: blocks are no longer compiled, and run eagerly: RuntimeError: C++ compile error\n"
    assert log("auto").count(line) == 1
    with pytest.raises(EngineError, match=r"got true, but torch .*RuntimeError: C\+\+ compile error\); .*=false"):
        train(make_trainer(tmp_path / "true", *SHORT, COMPILE, stage=stage))


def test_inputs_of_another_shape(make_trainer, tmp_path, fake, log):
    fake()
    trainer = make_trainer(tmp_path / "run", *SHORT)
    train(trainer, until=4)
    ids = torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        trainer.model(ids)
    assert trainer.engine.compiled.on, "validation is not compiled"
    trainer.model(ids)
    assert not trainer.engine.compiled.on
    assert "inputs of [1, 16, 32] follow [8, 32, 32]" in trainer.engine.compiled.take_warning()


def test_ranks_agree(pretrain, tmp_path):
    """One message and exit code 2 on both ranks, where compilation fails."""
    output = pretrain(
        tmp_path / "run", "--set", COMPILE, "training.max_steps=2", ranks=2, expect=2, environment={"CXX": "false"}
    )
    assert output.count("training.compile: got true") == 1


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_values(value, tmp_path):
    written = str(value).lower()
    (tmp_path / "run.yaml").write_text(f"training: {{compile: {written}}}\n")
    assert load_run_config(str(tmp_path / "run.yaml")).training.compile == value
    assert load_run_config("quickstart", [f"training.compile={written}"]).training.compile == value
    with pytest.raises(
        ConfigError, match=r"training.compile: got the text 'always', expected one of auto, true, false"
    ):
        load_run_config("quickstart", ["training.compile=always"])
