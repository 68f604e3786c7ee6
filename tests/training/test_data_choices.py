"""Data of a run: mixtures, packed documents, and several sources for validation."""

from __future__ import annotations

import json
import math

import pytest
from tiny_run import read_metrics

from data_pipeline.config import DataConfig
from data_pipeline.loading.loaders import open_data
from data_pipeline.loading.window_plans import write_plan
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from stlm.config import load_run_config
from stlm.errors import ConfigError
from stlm.stlm import STLM
from stlm.training import Trainer, build_loaders, build_optimizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make two prepared folders; the second has two sources."""
    directory = tmp_path_factory.mktemp("folders")
    outputs = []
    for name, letters in (("first", "a"), ("second", "bc")):
        inputs = []
        for letter in letters:
            path = directory / f"{letter}.jsonl"
            texts = [" ".join([letter * (1 + index % 5)] * (3 + index % 11)) + str(index) for index in range(60)]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            inputs.append(str(path))
        output = directory / name
        prepare(PrepareConfig((*inputs,), output=str(output), workers=1, validation_fraction=0.1))
        write_plan(open_data(DataConfig(dir=str(output))), "best_fit", 32, "length")
        outputs.append(output)
    return outputs


def train(config, run_dir, until):
    """Run the short loop up to a step, and return the bits per byte of the last validation."""
    data = open_data(config.data)
    model = STLM.from_config(config.model, data.tokenizer, seed=config.seed)
    optimizer = build_optimizer(model, config.training)
    trainer = Trainer(config, model, optimizer, *build_loaders(config, data), run_dir=run_dir)
    try:
        for step in trainer.steps():
            trainer.log(step, trainer.train_step(step))
            trainer.val_step()
            trainer.save_checkpoint(step)
            if step == until:
                break
        return trainer.validate()
    finally:
        trainer.close()


@pytest.mark.parametrize("embedder", ["byte", "byte_patch"])
def test_a_mixture_of_packed_documents_resumes_and_is_validated_by_source(folders, config_file, tmp_path, embedder):
    mixture = ", ".join(f"{{dir: {folder}, weight: {weight}}}" for folder, weight in zip(folders, (2, 1), strict=True))
    settings = [
        f"data.mixture=[{mixture}]",
        "data.packing=best_fit",
        "data.curriculum=length",
        f"model.embedder={{kind: {embedder}}}",
        f"model.head={{kind: {'linear' if embedder == 'byte' else 'byte_patch'}}}",
    ]
    config = load_run_config(config_file, settings)
    nats, ids, bytes = train(config, tmp_path / "whole", until=12)
    train(config, tmp_path / "parts", until=6)
    train(config, tmp_path / "parts", until=12)
    whole = read_metrics(tmp_path / "whole")
    assert read_metrics(tmp_path / "parts") == whole

    last = [record for record in whole if record["split"] == "validation"][-1]
    assert last["bits_per_byte"] == nats / math.log(2) / bytes
    names = [str(folders[0]), *(f"{folders[1]}: {folders[0].parent / letter}.jsonl" for letter in "bc")]
    of_source = last["bits_per_byte_of"]
    assert list(of_source) == names
    assert min(of_source.values()) < last["bits_per_byte"] < max(of_source.values())
    stream = open_data(config.data).split("validation")
    assert (ids, bytes) == (len(stream), stream.num_bytes)


def test_a_mixture_may_not_change_its_weights_when_it_is_resumed(folders, config_file, tmp_path):
    def mixed(weight):
        parts = f"[{{dir: {folders[0]}, weight: {weight}}}, {{dir: {folders[1]}}}]"
        return load_run_config(config_file, [f"data.mixture={parts}"])

    train(mixed(1), tmp_path / "run", until=6)
    with pytest.raises(ConfigError, match=r"data\.mixture: .* was trained on 1 of .*first, 1 of .*, now it is 3 of"):
        train(mixed(3), tmp_path / "run", until=12)
