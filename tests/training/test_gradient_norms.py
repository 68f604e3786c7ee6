"""Gradient norms by part of the model, compared with autograd, at every stage, and with the whole norm."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_run import read_metrics, train

from data_pipeline.loading.loaders import train_loader
from data_pipeline.loading.prepared_data import PreparedData
from stlm.config import load_run_config
from stlm.stlm import STLM
from stlm.training.deepspeed.gradient_norms import part_of

PARTS = ["embedder", "core.stack.blocks.0", "core.stack.blocks.1", "core", "head"]


@pytest.fixture(scope="module")
def plain_norms(data_dir, config_file):
    """Return a function that computes the norms of the first step in plain torch."""

    def norms(*overrides):
        config = load_run_config(config_file, overrides)
        data = PreparedData.open(data_dir)
        windows = train_loader(data, config.data, 32, 8, config.seed).rows(1, 0, 8)
        model = STLM.from_config(config.model, data.tokenizer, seed=config.seed)
        ids, mask = torch.from_numpy(windows.ids), torch.from_numpy(windows.loss_mask)
        F.cross_entropy(model(ids).logits[mask], ids[mask]).backward()
        squares = {}
        for name, parameter in model.named_parameters():
            part = next(part for part in (*PARTS[1:3], "embedder", "core", "head") if name.startswith(part))
            squares[part] = squares.get(part, 0.0) + parameter.grad.double().square().sum().item()
        return {part: math.sqrt(square) for part, square in squares.items()}

    return norms


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("clipping", [0, 0.05, 100])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_of_parts_equal_plain_torch(make_trainer, tmp_path, plain_norms, stage, clipping, tied):
    """Norms are taken before clipping, and a tied tensor counts for the embedder only."""
    overrides = [f"training.gradient_clipping={clipping}", f"model.head.tied={tied}"]
    trainer = make_trainer(tmp_path / "run", *overrides, stage=stage)
    train(trainer, until=1)
    (record,) = read_metrics(tmp_path / "run")
    found, expected = record["gradient_norm_of"], plain_norms(*overrides)
    assert list(found) == [part for part in PARTS if part in expected]
    assert found == pytest.approx(expected, rel=1e-5)
    assert math.hypot(*found.values()) == pytest.approx(record["gradient_norm"], rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_have_the_norms_of_one(make_trainer, pretrain, tmp_path, stage):
    """Compared at every step, with sizes for which ranks share tensors."""
    odd = ["model.width=18", "model.core.attention.num_heads=1", "model.head.tied=false", "training.max_steps=4"]
    train(make_trainer(tmp_path / "one", *odd))
    pretrain(tmp_path / "two", "--set", *odd, ranks=2, stage=stage)
    one, two = (read_metrics(tmp_path / name, "train") for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for expected, found in zip(one, two, strict=True):
        assert found["gradient_norm_of"] == pytest.approx(expected["gradient_norm_of"], rel=1e-3)
        assert math.hypot(*found["gradient_norm_of"].values()) == pytest.approx(found["gradient_norm"], rel=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_does_not_change_the_norms(make_trainer, tmp_path, plain_norms, stage):
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    overrides = ("training.gradient_clipping=0.05",)
    train(make_trainer(tmp_path / "run", *overrides, deepspeed_config={"zero_optimization": zero}), until=1)
    (record,) = read_metrics(tmp_path / "run")
    assert record["gradient_norm_of"] == pytest.approx(plain_norms(*overrides), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
def test_norms_are_those_of_unscaled_gradients(make_trainer, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("stlm.training.deepspeed.precision.cpu_flags", lambda: {"avx512_fp16"})
    # DeepSpeed records for the whole process that an engine used autocast; undo this.
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)
    trainer = make_trainer(tmp_path / "run", "training.precision=fp16", stage=stage)
    train(trainer, until=3)
    records = read_metrics(tmp_path / "run", "train")
    assert records
    for record in records:
        assert math.hypot(*record["gradient_norm_of"].values()) == pytest.approx(record["gradient_norm"], rel=1e-5)


def test_names_of_parts():
    names = {
        "embedder.local.blocks.0.attention.query.weight": "embedder",
        "core.stack.blocks.11.attention.query.weight": "core.stack.blocks.11",
        "core.norm.weight": "core",
        "head.output.weight": "head",
    }
    assert {name: part_of(name) for name in names} == names
