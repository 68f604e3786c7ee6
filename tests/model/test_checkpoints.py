"""A damaged or foreign model directory is refused with the reason."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pairs import make

from stlm.checkpoints import locate_model, newest_checkpoint
from stlm.config import ByteEmbedderConfig, LinearHeadConfig
from stlm.errors import CheckpointError
from stlm.stlm import STLM


@pytest.fixture
def saved(tmp_path):
    make(ByteEmbedderConfig(), LinearHeadConfig()).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_different_shape_names_the_tensors(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["core.norm.weight"]
    save_file(
        tensors | {"embedder.table.weight": torch.zeros(256, 16), "extra": torch.zeros(1)}, saved / "model.safetensors"
    )
    with pytest.raises(CheckpointError) as error:
        STLM.load(saved)
    for part in (
        "missing: core.norm.weight [32]",
        "embedder.table.weight: got [256, 16], expected [256, 32]",
        "unknown: extra",
    ):
        assert part in str(error.value)


def test_truncated_weights_are_refused(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged"):
        STLM.load(saved)


@pytest.mark.parametrize("limit", [200, 20_000])
def test_a_model_that_does_not_fit_leaves_nothing(saved, tmp_path, limit):
    """Saving fails either where Python writes the config or where safetensors writes the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = STLM.load(saved)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*other: "):
            model.save(tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(CheckpointError, match=r"cannot write .*config\.json/a: a part of the path is a file"):
        model.save(saved / "config.json" / "a")


def test_a_foreign_config_is_refused(saved):
    (saved / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="stlm-model-1"):
        STLM.load(saved)


def test_a_different_tokenizer_is_refused(saved):
    description = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({"format": "stlm-model-1", "model": {}}))
    with pytest.raises(CheckpointError, match=r"config\.json: lacks tokenizer_fingerprint"):
        STLM.load(saved)
    (saved / "config.json").write_text(json.dumps(description | {"tokenizer_fingerprint": "0" * 64}))
    with pytest.raises(CheckpointError, match="fingerprint"):
        STLM.load(saved)


def test_a_run_resolves_to_its_newest_complete_checkpoint(saved, tmp_path):
    run = tmp_path / "run"
    for step, complete in ((10, True), (200, True), (300, False)):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        (checkpoint / "model").mkdir(parents=True)
        (checkpoint / "model" / "config.json").write_text("{}")
        if complete:
            (checkpoint / "COMPLETE").write_text("{}")
    assert newest_checkpoint(run).name == "step_00000200"
    assert locate_model(run) == run / "checkpoints" / "step_00000200" / "model"
    with pytest.raises(CheckpointError, match="never finished"):
        locate_model(run / "checkpoints" / "step_00000300")
    with pytest.raises(CheckpointError, match="no such directory"):
        locate_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        locate_model(run / "checkpoints")


def test_saving_twice_replaces_the_whole_directory(saved):
    (saved / "stray").write_text("old")
    make(ByteEmbedderConfig(), LinearHeadConfig(), seed=9).save(saved)
    assert not (saved / "stray").exists()
    assert torch.equal(
        STLM.load(saved).embedder.table.weight,
        make(ByteEmbedderConfig(), LinearHeadConfig(), seed=9).embedder.table.weight,
    )
