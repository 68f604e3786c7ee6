"""The training loop on one rank: against plain torch, at every ZeRO stage, and with numbers that are not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_run import ROOT, read_metrics, train, update

from data_pipeline.loading.loaders import train_loader
from data_pipeline.loading.prepared_data import PreparedData
from stlm.config import TrainingConfig, load_deepspeed_config, load_run_config
from stlm.errors import NonFinite
from stlm.stlm import STLM
from stlm.training import build_optimizer
from stlm.training.deepspeed.state_transfer import full_state

NO_SKIPPING = ["training.recovery.max_skipped_in_a_row=0", "training.recovery.max_rollbacks=0"]


@pytest.fixture(scope="module")
def plain_losses(data_dir, config_file):
    """Return nats per id of every step, by a loop that shares only the model and the data order with the trainer."""
    config = load_run_config(config_file)
    data = PreparedData.open(data_dir)
    loader = train_loader(data, config.data, 32, 8, config.seed)
    model = STLM.from_config(config.model, data.tokenizer, seed=config.seed)
    embedding = model.embedder.table.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    rest = [p for p in model.parameters() if p.ndim == 1 or p is embedding]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(12):
        windows = loader.rows(step + 1, 0, 8)
        ids, mask = torch.from_numpy(windows.ids), torch.from_numpy(windows.loss_mask)
        loss = F.cross_entropy(model(ids).logits[mask], ids[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * (step + 1 - 3) / 9)) / 2
            group["lr"] = 3e-3 * ((step + 1) / 3 if step < 3 else 0.1 + 0.9 * cosine)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("micro_batch_size", ["null", "2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_like_plain_torch(make_trainer, tmp_path, plain_losses, stage, micro_batch_size):
    """Accumulation is included, where padding of the last window makes micro-batches of unequal weight."""
    trainer = make_trainer(tmp_path / "run", f"training.micro_batch_size={micro_batch_size}", stage=stage)
    losses = train(trainer)
    assert losses == pytest.approx(plain_losses, abs=1e-6)
    assert losses[-1] < losses[0] - 0.5


def test_bf16_at_every_stage(make_trainer, tmp_path):
    """All stages round alike, as gradients are summed in fp32 for any precision of the layers."""
    losses, moments = {}, {}
    for stage in (0, 2, 3):
        trainer = make_trainer(tmp_path / f"{stage}", "training.precision=bf16", stage=stage)
        update(trainer)
        moments[stage] = full_state(trainer.engine).moments["exp_avg"]
        losses[stage] = [update(trainer) for _ in range(11)]
    # The hooks of stage 3 change the order in which activation gradients are summed, in bf16.
    for stage, tolerance in ((2, 1e-5), (3, 2e-2)):
        assert losses[stage] == pytest.approx(losses[0], abs=1e-3)
        for name, tensor in moments[0].items():
            assert (tensor - moments[stage][name]).abs().max() < tolerance * tensor.abs().max()
    fp32 = make_trainer(tmp_path / "fp32", "training.precision=fp32")
    assert update(fp32) != pytest.approx(losses[0][0], abs=1e-6)


def test_the_documented_loop_trains(tmp_path, data_dir):
    """The loop of the documentation, on a small version of the quickstart preset."""
    from stlm.training import Trainer, build_loaders, build_optimizer

    config = load_run_config(
        "quickstart",
        ["model.width=16", "model.core.num_layers=1", "model.core.attention.num_heads=2", "model.embedder.width=16",
         "model.context_length=64", "training.max_steps=4", "training.batch_size=4", "training.warmup_steps=1",
         "training.log_every_steps=2", "training.eval_every_steps=3", "training.save_every_steps=2"],
    )  # fmt: skip
    data = PreparedData.open(data_dir)
    train_loader, validation_loader = build_loaders(config, data)
    model = STLM.from_config(config.model, data.tokenizer, seed=config.seed)
    optimizer = build_optimizer(model, config.training)
    trainer = Trainer(
        config, model, optimizer, train_loader, validation_loader,
        run_dir=tmp_path / "run", deepspeed_config=load_deepspeed_config(ROOT / "ds_configs/zero2.json"), resume="auto",
    )  # fmt: skip
    for step in trainer.steps():
        loss = trainer.train_step(step)
        trainer.log(step, loss)
        trainer.val_step()
        trainer.save_checkpoint(step)

    metrics = read_metrics(tmp_path / "run")
    assert [record["step"] for record in metrics if record["split"] == "train"] == [1, 2, 4]
    assert [record["step"] for record in metrics if record["split"] == "validation"] == [3, 4]
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "lock",
        "metrics.jsonl",
        "tensorboard",
        "train.log",
    ]
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert load_run_config(tmp_path / "run") == config
    loaded = STLM.load(tmp_path / "run")
    assert loaded.head.output.weight is loaded.embedder.table.weight
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


def test_validation_is_exact(make_trainer, tmp_path, data_dir):
    """Every id of the split counts once; end_of_text costs bits but is no byte; padding does not count."""
    trainer = make_trainer(tmp_path / "run", "training.batch_size=6", stage=3)
    update(trainer)
    nats, ids, bytes = trainer.validate()
    data = PreparedData.open(data_dir)
    stream = data.split("validation")
    assert len(stream) % 32 > 0
    assert -(-len(stream) // 32) % 6 > 0
    assert (ids, bytes) == (len(stream), stream.num_bytes)

    model = STLM.from_config(trainer.config.model, data.tokenizer)
    state = full_state(trainer.engine)
    model.load_tensors(state.parameters, source="the engine")
    expected = 0.0
    with torch.no_grad():
        for start in range(0, len(stream), 32):
            text = torch.from_numpy(stream.read(start, min(start + 32, len(stream)))).long()[None]
            expected += F.cross_entropy(model(text).logits[0].double(), text[0], reduction="sum").item()
    assert nats == pytest.approx(expected, rel=1e-7)

    distributed = trainer.distributed
    for world_size in (2, 3, 50):  # as ranks would share it, also more ranks than there are groups of windows
        shares = []
        for rank in range(world_size):
            distributed.ranks = replace(distributed.ranks, rank=rank, world_size=world_size)
            shares.append(trainer.validate())
        totals = [sum(column) for column in zip(*shares, strict=True)]
        assert totals == pytest.approx([nats, ids, bytes], rel=1e-12)


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, tmp_path):
    """The error names the step and the rows; model and checkpoint stay as they were."""
    overrides = ["model.head.tied=false", "training.micro_batch_size=1", "training.save_every_steps=2", *NO_SKIPPING]
    trainer = make_trainer(tmp_path / "run", *overrides, stage=2)
    train(trainer, until=2)
    inputs = torch.from_numpy(trainer.train_loader.rows(3, 0, 8).ids)[:, :-1]
    rows_with = {byte: [row for row in range(8) if byte in inputs[row]] for byte in b"abcdefghijklmnopqrstuvwxyz"}
    rare = next(byte for byte, found in rows_with.items() if 0 < len(found) < 8)
    with torch.no_grad():
        trainer.model.embedder.table.weight[rare] = torch.nan
    before = full_state(trainer.engine)
    rows = ", ".join(str(row) for row in rows_with[rare])
    with pytest.raises(NonFinite, match=rf"loss of step 3 is not finite \(rows {rows} of its batch\).*step 2"):
        update(trainer)
    after = full_state(trainer.engine)
    for name, tensor in before.parameters.items():
        assert torch.equal(tensor, after.parameters[name])
    assert NonFinite.exit_code == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_the_run(make_trainer, tmp_path, stage):
    trainer = make_trainer(tmp_path / "run", "training.gradient_clipping=0", *NO_SKIPPING, stage=stage)
    update(trainer)
    before = full_state(trainer.engine)
    blow_up(trainer.engine)
    with pytest.raises(NonFinite, match=r"gradient of step 2 is not finite \(rows 0-7"):
        update(trainer)
    after = full_state(trainer.engine)
    for name, tensor in before.parameters.items():
        assert torch.equal(tensor, after.parameters[name])


def blow_up(engine):
    """Make the next gradient infinite although the loss is not."""
    forward = engine.forward

    def forward_with_explosive_gradient(*inputs, **named):
        output = forward(*inputs, **named)
        return output._replace(logits=Explosive.apply(output.logits))

    engine.forward = forward_with_explosive_gradient


class Explosive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def test_the_norm_is_reported_before_clipping(make_trainer, tmp_path):
    """The reported norm is the same at every stage, and clipping changes the update."""
    norms, losses = {}, {}
    for stage, clipping in [(0, 1.0), (2, 1.0), (0, 0.05), (2, 0.05), (3, 0.05), (0, 0.0)]:
        overrides = [f"training.gradient_clipping={clipping}", "training.epsilon=1"]  # 1: the step follows the gradient
        trainer = make_trainer(tmp_path / f"{stage}-{clipping}", *overrides, stage=stage)
        losses[stage, clipping] = train(trainer, until=3)[-1]
        norms[stage, clipping] = read_metrics(tmp_path / f"{stage}-{clipping}")[0]["gradient_norm"]
    assert min(norms.values()) > 1
    assert list(norms.values()) == pytest.approx([norms[0, 1.0]] * 6, rel=1e-5)
    assert losses[2, 0.05] == pytest.approx(losses[0, 0.05], abs=1e-6) == pytest.approx(losses[3, 0.05], abs=1e-6)
    assert len({round(loss, 4) for loss in losses.values()}) == 3


def test_matrices_decay_and_the_rest_does_not(make_trainer, tmp_path, config_file, data_dir):
    config = load_run_config(config_file)
    model = STLM.from_config(config.model, PreparedData.open(data_dir).tokenizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, exempt = build_optimizer(model, TrainingConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert [names[p] for p in exempt["params"] if p.ndim > 1] == ["embedder.table.weight"]  # and so the tied head
    together = decayed["params"] + exempt["params"]
    assert sorted(names[parameter] for parameter in together) == sorted(names.values())
