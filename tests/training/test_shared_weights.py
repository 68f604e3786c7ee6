"""Layers that share weights, at every ZeRO stage: one parameter in the optimizer, one tensor in a checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import CONFIG, build_trainer, read_metrics, train

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import load_run_config
from stlm.errors import CheckpointError, ConfigError
from stlm.stlm import STLM
from stlm.training import build_optimizer

PLAN = """
  core:
    num_layers: 3
    attention: {num_heads: 2}
    sharing: {modules: {feed_forward: [[0, 1]], attention.output: [[0, 2]], attention_norm: all}, lora_rank: 2}
    loops: {count: 2, first: 1, last: 2, embeddings: true}
"""


@pytest.fixture(scope="module")
def shared_config(tmp_path_factory):
    """Return the tiny run's config, with shared layers in and before a loop, and corrections."""
    path = tmp_path_factory.mktemp("config") / "shared.yaml"
    (core,) = (line for line in CONFIG.splitlines() if line.startswith("  core:"))
    path.write_text(CONFIG.replace(core, PLAN.strip("\n")))
    return path


@pytest.fixture(scope="module")
def finished(shared_config, data_dir, tmp_path_factory):
    """Run twelve steps on one rank at stage 0."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(build_trainer(shared_config, data_dir, run_dir))
    return run_dir


def stopped(run_dir, copy):
    """Copy that run as it was after its checkpoint of step 6."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints/step_00000012")
    return copy


def assert_alike(run_dir, other):
    found, expected = read_metrics(run_dir), read_metrics(other)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for key in ("loss", "bits_per_byte"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], abs=1e-5)


def assert_each_tensor_once(run_dir, config_file):
    """Check that a checkpoint holds shared tensors and their moments once."""
    path = run_dir / "checkpoints/step_00000012"
    model = STLM(load_run_config(config_file).model, build_tokenizer("byte"))
    names = [name for name, _ in model.named_parameters()]
    assert len(names) < len(list(model.named_parameters(remove_duplicate=False)))
    saved, moments = load_file(path / "model/model.safetensors"), load_file(path / "optimizer.safetensors")
    assert sorted(saved) == sorted(names)
    assert sorted(moments) == sorted(f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in names)
    loaded = STLM.load(run_dir)
    first, second, *_ = loaded.core.stack.blocks
    assert first.feed_forward.gate.weight.data_ptr() == second.feed_forward.gate.weight.data_ptr()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_trains_alike_and_continues(data_dir, shared_config, finished, tmp_path, stage):
    """All stages begin equally, and resume digit for digit."""
    train(build_trainer(shared_config, data_dir, tmp_path / "whole", "training.micro_batch_size=4", stage=stage))
    assert_alike(tmp_path / "whole", finished)
    assert_each_tensor_once(tmp_path / "whole", shared_config)
    halves = stopped(tmp_path / "whole", tmp_path / "halves")
    train(build_trainer(shared_config, data_dir, halves, "training.micro_batch_size=4", stage=stage, resume="must"))
    assert read_metrics(halves) == read_metrics(tmp_path / "whole")
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        whole, continued = (tmp_path / name / "checkpoints/step_00000012" / file for name in ("whole", "halves"))
        assert whole.read_bytes() == continued.read_bytes()


def test_two_ranks_at_stage_3(pretrain, shared_config, finished, tmp_path):
    pretrain(tmp_path / "whole", ranks=2, stage=3, config=shared_config)
    assert_alike(tmp_path / "whole", finished)
    assert_each_tensor_once(tmp_path / "whole", shared_config)
    halves = stopped(tmp_path / "whole", tmp_path / "halves")
    assert "continuing from" in pretrain(halves, ranks=2, stage=3, config=shared_config)
    assert read_metrics(halves) == read_metrics(tmp_path / "whole")
    whole, continued = (run / "checkpoints/step_00000012" for run in (tmp_path / "whole", halves))
    for name, tensor in load_file(whole / "model/model.safetensors").items():
        assert torch.equal(tensor, load_file(continued / "model/model.safetensors")[name])


def test_shared_tensors_decay_once_and_by_their_kind(shared_config):
    model = STLM.from_config(load_run_config(shared_config).model, build_tokenizer("byte"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, exempt = build_optimizer(model, load_run_config(shared_config).training).param_groups
    together = [names[parameter] for parameter in decayed["params"] + exempt["params"]]
    assert sorted(together) == sorted(names.values())
    exempt_matrices = [names[parameter] for parameter in exempt["params"] if parameter.ndim > 1]
    assert exempt_matrices == ["embedder.table.weight", "core.stack.loop_embeddings.weight"]
    corrections = [name for name in (names[parameter] for parameter in decayed["params"]) if ".lora_" in name]
    assert len(corrections) == 2 * (2 * 3 + 2)


def test_a_run_does_not_resume_with_other_ties(data_dir, shared_config, finished, tmp_path):
    """The run's config and, where that is missing, the checkpoint's own name the key and its former value."""
    run_dir = stopped(finished, tmp_path / "run")
    other = "model.core.sharing.modules.attention_norm=[[0, 1]]"
    expected = (
        r'model\.core\.sharing\.modules: was \{.*"attention_norm": "all"\}, now \{.*"attention_norm": \[\[0, 1\]\]\}'
    )
    with pytest.raises(ConfigError, match=expected):
        build_trainer(shared_config, data_dir, run_dir, other)
    (run_dir / "config.yaml").unlink()
    with pytest.raises(
        CheckpointError, match=r"with different settings: model\.core\.sharing\.modules \(\{'feed_forward': \[\[0, 1\]"
    ):
        build_trainer(shared_config, data_dir, run_dir, other)
