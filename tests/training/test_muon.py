"""Muon: the update by hand, and the same updates for all ZeRO stages, ranks and resumes."""

from __future__ import annotations

import pytest
import torch
from tiny_run import read_metrics, train

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import RunConfig, TrainingConfig, load_run_config
from stlm.errors import ConfigError
from stlm.stlm import STLM
from stlm.training import build_optimizer
from stlm.training.optim.muon import MOMENTUM, Muon, orthogonalize_all
from stlm.training.run.checkpoint import read_state

MUON = "training.optimizer=muon"


def orthogonalized(matrix, dtype=torch.float32):
    return orthogonalize_all([matrix], dtype)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 8)])
def test_orthogonalization_keeps_singular_vectors(shape, dtype):
    """Singular vectors stay the same, and singular values, here from 1 to 100, come near 1."""
    torch.manual_seed(1)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, 2, min(shape[-2:]))
    found = u.mT @ orthogonalized(u * values @ vt, dtype) @ vt.mT
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > (0.67 if dtype == torch.float32 else 0.6)
    assert diagonal.max() < (1.33 if dtype == torch.float32 else 1.45)
    assert (found - torch.diag_embed(diagonal)).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_a_batch_equals_each_matrix(monkeypatch):
    """Matrices, transposed ones and stacks of one shape share batches; a small limit gives several batches."""
    torch.manual_seed(5)
    matrices = [torch.randn(shape) for shape in ((8, 4), (4, 8), (3, 8, 4), (4, 4), (8, 4), (2, 3, 4, 8))]
    alone = [orthogonalized(matrix) for matrix in matrices]
    for limit in (1, 100, 1 << 24):
        monkeypatch.setattr("stlm.training.optim.muon.BATCH", limit)
        together = orthogonalize_all(matrices, torch.float32)
        for first, second, matrix in zip(alone, together, matrices, strict=True):
            assert first.shape == second.shape == matrix.shape
            assert torch.allclose(first, second, atol=1e-6)


def test_two_updates_by_hand():
    torch.manual_seed(2)
    start, first, second = torch.randn(3, 8, 4)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon([{"params": [weight], "orthogonal": True, "weight_decay": 0.1}], 0.01, (0.9, 0.95), 1e-8)
    expected, momentum = start.clone(), torch.zeros(8, 4)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + gradient
        update = orthogonalized(gradient + MOMENTUM * momentum)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 8**0.5 * update
    assert torch.allclose(weight, expected, atol=1e-6)


def test_which_parameters_are_orthogonalized(config_file):
    """Matrices of layers are; the table, the last matrix and vectors are not, tied or untied."""
    for tied in ("true", "false"):
        config = load_run_config(config_file, [f"model.head={{kind: linear, tied: {tied}}}", MUON])
        model = STLM.from_config(config.model, build_tokenizer("byte"))
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = build_optimizer(model, config.training).param_groups
        inside = {names[p] for group in groups if group["orthogonal"] for p in group["params"]}
        assert inside == {
            name for name in names.values() if name.startswith("core.stack.blocks.") and "norm" not in name
        }
        assert sum(len(group["params"]) for group in groups) == len(names)
        decays = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
        assert decays["embedder.table.weight"] == 0.0
        assert tied == "true" or decays["head.output.weight"] == 0.1


def test_other_parameters_follow_adamw(config_file):
    config = load_run_config(config_file)
    models = [STLM.from_config(config.model, build_tokenizer("byte"), seed=3) for _ in range(2)]
    optimizers = [
        build_optimizer(m, TrainingConfig(optimizer=o)) for m, o in zip(models, ("adamw", "muon"), strict=True)
    ]
    torch.manual_seed(4)
    for _ in range(3):
        for first, second in zip(*(model.parameters() for model in models), strict=True):
            first.grad = torch.randn_like(first)
            second.grad = first.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    first, second = (dict(model.named_parameters()) for model in models)
    same = {name for name in first if torch.allclose(first[name], second[name], atol=1e-7)}
    assert same == {name for name in first if not name.startswith("core.stack.blocks.") or "norm" in name}


@pytest.mark.deepspeed
def test_every_stage_makes_the_same_updates(make_trainer, tmp_path):
    """A run may change its stage, and the momentum is kept."""
    whole = train(make_trainer(tmp_path / "whole", MUON))
    assert whole[-1] < whole[0] - 0.6
    for number, stages in enumerate([(0, 0), (0, 3), (1, 2), (2, 0), (3, 1)]):
        losses = []
        for stage, until in zip(stages, (6, None), strict=True):
            losses += train(make_trainer(tmp_path / f"run{number}", MUON, stage=stage), until)
        assert losses == pytest.approx(whole, abs=0 if stages == (0, 0) else 2e-6)
    states = [read_state(tmp_path / name / "checkpoints/step_00000012") for name in ("whole", "run1")]
    assert sorted(states[0].moments) == ["exp_avg", "exp_avg_sq", "momentum"]
    for name, momentum in states[0].moments["momentum"].items():
        assert torch.allclose(momentum, states[1].moments["momentum"][name], atol=1e-5)


@pytest.mark.slow
def test_two_ranks_make_the_updates_of_one(pretrain, make_trainer, tmp_path):
    """Matrices divided over ranks are assembled; runs change from two ranks to one and back."""
    constant = (MUON, "training.schedule=constant")
    whole = train(make_trainer(tmp_path / "whole", *constant))
    for number, (stage, *ranks) in enumerate([(2, 2, 1), (3, 2, 1), (1, 1, 2), (0, 2, 1)]):
        run_dir = tmp_path / f"run{number}"
        for count, steps in zip(ranks, (6, 12), strict=True):
            pretrain(run_dir, "--set", *constant, f"training.max_steps={steps}", ranks=count, stage=stage)
        losses = [record["loss"] for record in read_metrics(run_dir, "train")]
        assert losses == pytest.approx(whole, abs=2e-6)


def test_muon_with_a_base_width_is_refused():
    with pytest.raises(ConfigError, match=r"training.optimizer: got 'muon' with model.base_width = 64"):
        load_run_config("quickstart", [MUON, "model.base_width=64"])
    assert RunConfig().training.optimizer == "adamw"
