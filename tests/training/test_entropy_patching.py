"""Entropy patching across runs: a byte model is trained, adopted frozen, saved with the run, and not needed again."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import build_trainer, read_metrics, train

from stlm.checkpoints import newest_checkpoint
from stlm.errors import ConfigError
from stlm.stlm import STLM

CORE = "model.core={num_layers: 1, attention: {num_heads: 2}}"
BYTE_MODEL = ["model.width=16", CORE, "training.max_steps=8"]
PATCHES = [
    "model.embedder={kind: byte_patch, width: 16, window: 8, patching: {kind: entropy, patch_length: 4, width: 16}}",
    "model.embedder.patching.core={num_layers: 1, attention: {num_heads: 2}}",
    "model.head={kind: byte_patch, window: 8}",
    CORE,
]
PREFIX = "embedder.patching.model."


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory, data_dir, config_file):
    run_dir = tmp_path_factory.mktemp("entropy") / "byte"
    train(build_trainer(config_file, data_dir, run_dir, *BYTE_MODEL))
    return run_dir


@pytest.fixture(scope="module")
def losses_of_stage_0(byte_run, tmp_path_factory, data_dir, config_file):
    run_dir = tmp_path_factory.mktemp("stage0") / "run"
    trainer = build_trainer(config_file, data_dir, run_dir, *PATCHES, named(byte_run))
    return train(trainer)


def named(run):
    return f"model.embedder.patching.entropy_model={run}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_part_trains_alike_at_every_stage(make_trainer, tmp_path, byte_run, losses_of_stage_0, stage):
    """The run resumes digit for digit without the byte model's folder; losses are equal at every stage."""
    source = tmp_path / "source"
    shutil.copytree(byte_run, source)
    byte_model = STLM.load(byte_run)
    losses = train(make_trainer(tmp_path / "run", *PATCHES, named(source), stage=stage), until=6)
    shutil.rmtree(source)
    losses += train(make_trainer(tmp_path / "run", *PATCHES, named(source), stage=stage, resume="must"))
    if stage == 0:
        assert losses == losses_of_stage_0
    assert losses == pytest.approx(losses_of_stage_0, abs=1e-5)

    checkpoint = newest_checkpoint(tmp_path / "run")
    optimizer = load_file(checkpoint / "optimizer.safetensors")
    assert optimizer and not any("patching" in name for name in optimizer)
    loaded = STLM.load(tmp_path / "run")
    parameters = dict(loaded.named_parameters())
    for name, parameter in byte_model.named_parameters():
        assert torch.equal(parameters[PREFIX + name], parameter)
        assert not parameters[PREFIX + name].requires_grad
    lengths = [record["patch_length"] for record in read_metrics(tmp_path / "run", "train")]
    assert sum(lengths) / len(lengths) == pytest.approx(4.0, abs=0.2)

    ids = torch.randint(97, 123, (1, 32))
    inputs = torch.cat((torch.full((1, 1), loaded.tokenizer.start_id), ids[:, :-1]), 1)
    log_p = byte_model(ids).logits.log_softmax(-1).double()
    bits = -(log_p.exp() * log_p).sum(-1) / torch.tensor(2.0).log()
    torch.testing.assert_close(loaded.embedder.patching.entropy(inputs).double(), bits, atol=1e-5, rtol=0)


def test_precision_does_not_change_patches(make_trainer, tmp_path, byte_run):
    """Entropies are computed in fp32 even where training is not."""
    lengths = []
    for precision in ("fp32", "bf16"):
        trainer = make_trainer(
            tmp_path / precision, *PATCHES, named(byte_run), f"training.precision={precision}", "training.max_steps=4"
        )
        train(trainer)
        lengths.append([record["patch_length"] for record in read_metrics(tmp_path / precision, "train")])
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"patching\.entropy_model: got null, expected the run of a byte model; train one with"),
        ([named("nowhere")], r"patching\.entropy_model: nowhere: no such directory"),
        (["model.embedder.patching.width=32"], r"patching\.width: got 32, but .* has 16; \S*patching\.width=16 would"),
        (
            ["model.embedder.patching.core.attention.num_heads=1"],
            r"patching\.core\.attention\.num_heads: got 1, .*patching\.core\.attention\.num_heads=2 would work",
        ),
        (
            ["model.context_length=64"],
            r"entropy_model: .* reads windows of 32 ids, expected at least model\.context_length = 64; "
            r"model\.context_length=32 would work",
        ),
    ],
)
def test_byte_models_that_do_not_fit_are_refused(make_trainer, tmp_path, byte_run, settings, message):
    given = settings if not settings or "entropy_model" in settings[0] else [named(byte_run), *settings]
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path / "run", *PATCHES, *given)


def test_other_models_are_refused_as_byte_models(make_trainer, tmp_path, byte_run):
    train(make_trainer(tmp_path / "patches", *PATCHES, named(byte_run), "training.max_steps=4"))
    with pytest.raises(ConfigError, match=r"entropy_model: .* whose embedder is .*'model\.embedder=\{kind: byte\}'"):
        make_trainer(tmp_path / "run", *PATCHES, named(tmp_path / "patches"))


def test_a_byte_model_with_uniform_predictions_is_refused(make_trainer, tmp_path, byte_run):
    model = STLM.load(byte_run)
    with torch.no_grad():
        model.embedder.table.weight.zero_()
    model.save(tmp_path / "alike")
    with pytest.raises(
        ConfigError, match=r"entropy_model: it finds many bytes equally hard .*8\.000 to 8\.000.*train it"
    ):
        make_trainer(tmp_path / "run", *PATCHES, named(tmp_path / "alike"))
