"""DeepSpeed's own checkpoints, imported and exported, checked by DeepSpeed's own loader."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_run import ROOT, build_trainer, read_metrics, spawn, train

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import load_run_config
from stlm.errors import ConversionError
from stlm.stlm import STLM
from stlm.training import build_optimizer
from stlm.training.deepspeed.formats import import_deepspeed, write_deepspeed
from stlm.training.distributed.connection import Distributed
from stlm.training.distributed.ranks import rank_environment
from stlm.training.run.checkpoint import read_state

IDS = torch.arange(8 * 32).view(8, 32) * 7919 % 251


def plain_engine(config, stage, **blocks):
    """Set up a model with DeepSpeed as users write it, without this project's engine."""
    import deepspeed

    with rank_environment(Distributed.join().ranks):
        model = STLM.from_config(config.model, build_tokenizer("byte"), seed=2)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.training),
            config={
                "train_batch_size": 8,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                **blocks,
            },
        )
    return engine


def moment(engine, parameter, key):
    """Read a moment through DeepSpeed; stages 1 and 2 must relink their states for parameters of the second group."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return safe_get_full_optimizer_state(parameter, key)


def plain_step(engine):
    logits = engine(IDS).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), IDS.flatten())
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.parametrize(
    ("stage", "block"),
    [(0, {}), (0, {"bf16": {"enabled": True}}), (1, {}), (1, {"bf16": {"enabled": True}}), (2, {}),
     (2, {"bf16": {"enabled": True}}), (3, {}), (3, {"bf16": {"enabled": True}})],
)  # fmt: skip
def test_checkpoints_of_deepspeed_are_read(config_file, tmp_path, stage, block):
    """Three steps of plain DeepSpeed: weights, moments and updates equal those that DeepSpeed itself reads."""
    config = load_run_config(config_file)
    engine = plain_engine(config, stage, **block)
    for _ in range(3):
        plain_step(engine)
    engine.save_checkpoint(str(tmp_path / "native"))
    told = import_deepspeed(tmp_path / "native", tmp_path / "run", str(config_file))
    assert told.endswith("with their moments, at step 3")
    state = read_state(tmp_path / "run/checkpoints/step_00000003")
    assert state.updates == (4 if block and stage == 0 else 3)  # DeepSpeed creates an empty one there at the start

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if stage:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "native"))
    elif block:
        groups = engine.optimizer.fp32_groups
        order = [p for group in engine.optimizer.fp16_groups for p in group]
        names = {p: name for name, p in engine.module.named_parameters()}
        weights = {names[p]: value for p, value in zip(order, (v for g in groups for v in g), strict=True)}
    else:
        weights = dict(engine.module.named_parameters())
    assert {*state.parameters} == {name for name, _ in engine.module.named_parameters()}
    for number, (name, parameter) in enumerate(engine.module.named_parameters()):
        assert torch.equal(state.parameters[name], weights[name]), name
        for key in ("exp_avg", "exp_avg_sq"):
            if stage:
                expected = moment(engine, parameter, key)
            elif block:
                expected = engine.optimizer.optimizer.state[weights[name]][key]
            else:
                expected = engine.optimizer.state[parameter][key]
            assert torch.equal(state.moments[key][name], expected), (name, key, number)
    engine.destroy()


@pytest.fixture(scope="module")
def run(data_dir, config_file, tmp_path_factory):
    """Convert the first checkpoint, of step 6, of a run of 12 steps."""
    run_dir = tmp_path_factory.mktemp("formats") / "run"
    train(build_trainer(config_file, data_dir, run_dir))
    return run_dir


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_continues_from_written_checkpoints(run, config_file, data_dir, tmp_path, stage):
    """The next step is equal in plain DeepSpeed, in this project, and in a run made from DeepSpeed's checkpoint."""
    source = run / "checkpoints/step_00000006"
    told = write_deepspeed(
        "deepspeed", source, tmp_path / "out", {"zero_optimization": {"stage": stage}}, Distributed.join()
    )
    assert f"step 6, for 1 rank at ZeRO stage {stage}; weights and moments read back are the same" in told
    config = load_run_config(config_file)
    losses = []
    engine = plain_engine(config, stage)
    path, beside = engine.load_checkpoint(str(tmp_path / "out"))
    assert path is not None and beside["stlm"]["step"] == engine.global_steps == 6
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    assert rates == pytest.approx([read_metrics(run, "train")[5]["learning_rate"]] * 2)
    losses.append([plain_step(engine) for _ in range(2)])
    engine.destroy()

    model = STLM.load(source)
    optimizer = build_optimizer(model, config.training)
    state = read_state(source)
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        moments = {key: tensors[name].clone() for key, tensors in state.moments.items()}
        optimizer.state[parameter] = {"step": torch.tensor(6.0), **moments}
    for group in optimizer.param_groups:
        group["lr"] = rates[0]
    losses.append([])
    for _ in range(2):
        loss = F.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)

    import_deepspeed(tmp_path / "out", tmp_path / "again")
    train(build_trainer(tmp_path / "again", data_dir, tmp_path / "again", resume="must"))
    assert read_metrics(tmp_path / "again") == read_metrics(run)[-len(read_metrics(tmp_path / "again")) :]


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_round_trip_keeps_muon_and_restarts_the_average(config_file, data_dir, tmp_path, stage):
    """Weights and both kinds of moments return; the average, which DeepSpeed cannot store, restarts at the weights."""
    given = ("training.optimizer=muon", "training.ema_decay=0.9")
    train(build_trainer(config_file, data_dir, tmp_path / "run", *given, stage=stage), until=6)
    source = tmp_path / "run/checkpoints/step_00000006"
    write_deepspeed("deepspeed", source, tmp_path / "out", {"zero_optimization": {"stage": stage}}, Distributed.join())
    import_deepspeed(tmp_path / "out", tmp_path / "again")
    before, after = (read_state(path) for path in (source, tmp_path / "again/checkpoints/step_00000006"))
    assert sorted(before.moments) == sorted(after.moments) == ["ema", "exp_avg", "exp_avg_sq", "momentum"]
    assert after.updates == 6
    for key in ("exp_avg", "exp_avg_sq", "momentum"):
        assert before.moments[key].keys() == after.moments[key].keys()
        assert all(torch.equal(after.moments[key][name], value) for name, value in before.moments[key].items())
    for name, value in before.parameters.items():
        assert torch.equal(after.parameters[name], value) and torch.equal(after.moments["ema"][name], value)
    train(build_trainer(tmp_path / "again", data_dir, tmp_path / "again", resume="must"))
    assert read_metrics(tmp_path / "again", "train")[-1]["step"] == 12


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bf16_engine_loads_a_written_checkpoint(run, config_file, tmp_path, stage):
    source = run / "checkpoints/step_00000006"
    write_deepspeed(
        "deepspeed", source, tmp_path / "out", {"zero_optimization": {"stage": stage}}, Distributed.join(), bf16=True
    )
    engine = plain_engine(load_run_config(config_file), stage, bf16={"enabled": True})
    path, _ = engine.load_checkpoint(str(tmp_path / "out"))
    assert path is not None
    from deepspeed.utils import safe_get_full_fp32_param

    state = read_state(source)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), state.parameters[name])
    assert plain_step(engine) < 6
    engine.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_loads_universal_checkpoints(run, config_file, data_dir, tmp_path, stage):
    """DeepSpeed loads it with load_universal, and the conversion back restores it."""
    source = run / "checkpoints/step_00000006"
    told = write_deepspeed(
        "universal", source, tmp_path / "out", {"zero_optimization": {"stage": stage}}, Distributed.join()
    )
    assert "for any number of ranks at ZeRO stage" in told
    engine = plain_engine(load_run_config(config_file), stage, checkpoint={"load_universal": True})
    path, _ = engine.load_checkpoint(str(tmp_path / "out"))
    assert path is not None and engine.global_steps == 6
    from deepspeed.utils import safe_get_full_fp32_param

    state = read_state(source)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), state.parameters[name])
        assert torch.equal(moment(engine, parameter, "exp_avg"), state.moments["exp_avg"][name])
    engine.destroy()
    import_deepspeed(tmp_path / "out", tmp_path / "again")
    again = read_state(tmp_path / "again/checkpoints/step_00000006")
    assert again.updates == 6
    assert all(
        torch.equal(again.moments["exp_avg_sq"][name], value) for name, value in state.moments["exp_avg_sq"].items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_by_the_script(run, tmp_path, data_dir, stage):
    """The script on two ranks writes a checkpoint for two; read by one, it has the same state."""
    script = [sys.executable, str(ROOT / "scripts/convert_checkpoint.py")]
    processes = spawn(
        [*script, str(run), "--to", "deepspeed", "--ds_config", str(ROOT / f"ds_configs/zero{stage}.json"),
         "--output", str(tmp_path / "out")], 2,
    )  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"for 2 ranks at ZeRO stage {stage}; weights and moments read back" in outputs[0][0]
    files = {file.name for file in (tmp_path / "out/global_step12").iterdir()}
    assert stage == 0 or sum("optim_states" in name for name in files) == 2
    back = [*script, str(tmp_path / "out"), "--from", "deepspeed", "--output", str(tmp_path / "again")]
    done = subprocess.run(back, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = (read_state(path / "checkpoints/step_00000012") for path in (run, tmp_path / "again"))
    for key in ("exp_avg", "exp_avg_sq"):
        assert all(torch.equal(other.moments[key][name], value) for name, value in one.moments[key].items())
    assert all(torch.equal(other.parameters[name], value) for name, value in one.parameters.items())


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_user_errors_are_one_message(run, config_file, tmp_path, capfd):
    out = tmp_path / "out"
    write_deepspeed("deepspeed", run, out, {"zero_optimization": {"stage": 2}}, Distributed.join())
    with pytest.raises(ConversionError, match=r"--to universal: got ZeRO stage 0 .* expected stage 1, 2 or 3"):
        write_deepspeed("universal", run, tmp_path / "none", {"zero_optimization": {"stage": 0}}, Distributed.join())
    with pytest.raises(ConversionError, match=r"--bf16: got ZeRO stage 0 .* expected stage 1, 2 or 3"):
        write_deepspeed(
            "deepspeed", run, tmp_path / "none", {"zero_optimization": {"stage": 0}}, Distributed.join(), bf16=True
        )
    with pytest.raises(ConversionError, match=r"run is not a DeepSpeed checkpoint: it has no \*model_states.pt"):
        import_deepspeed(run, tmp_path / "none", str(config_file))
    other = tmp_path / "other.yaml"
    other.write_text(config_file.read_text().replace("width: 32", "width: 64"))
    shapes = re.escape("embedder.table.weight has the shape [256, 32], expected [256, 64]")
    with pytest.raises(ConversionError, match=f"does not fit the model in the config: {shapes}"):
        import_deepspeed(out, tmp_path / "none", str(other))
    (out / "config.yaml").unlink()
    with pytest.raises(ConversionError, match=r"has no config.yaml or .* with --config"):
        import_deepspeed(out, tmp_path / "none")
    (file,) = (out / "global_step12").glob("*optim_states.pt")
    contents = file.read_bytes()
    file.write_bytes(contents[:-1000])
    with pytest.raises(ConversionError, match=r"optim_states.pt: cannot be read"):
        import_deepspeed(out, tmp_path / "none", str(config_file))
    torch.save({"optimizer_state_dict": Evil()}, file)
    with pytest.raises(ConversionError, match=r"holds print, .* could run code; the file was not read"):
        import_deepspeed(out, tmp_path / "none", str(config_file))
    assert "this ran" not in capfd.readouterr().out
    file.unlink()
    with pytest.raises(ConversionError, match=r"has the optimizer files of 0 ranks, expected those of 1"):
        import_deepspeed(out, tmp_path / "none", str(config_file))
    assert not (tmp_path / "none").exists()
