"""A model in one file: only rounding changes it, and a damaged file is refused."""

import json

import numpy as np
import pytest
import torch

from data_pipeline.config import DataConfig
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.tokenizers import build_tokenizer, train_sentencepiece
from stlm.artifact import MAGIC, decode_artifact, encode_artifact, pack, unpack
from stlm.checkpoints import describe_model
from stlm.config import (
    ByteEmbedderConfig,
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    SharingConfig,
    TokenEmbedderConfig,
    TransformerCoreConfig,
    dump_run_config,
)
from stlm.config.yaml.fields import FreeSection
from stlm.errors import CheckpointError, ConversionError
from stlm.evals import Subject
from stlm.export import convert_to_artifact
from stlm.export.artifact.calibration import quantize, round_for_inputs
from stlm.export.comparison import sample_text
from stlm.model.decoding.quantization import round_to_nearest
from stlm.stlm import STLM

CORE = TransformerCoreConfig(num_layers=2, attention=GroupedQueryConfig(num_heads=2))
SHARED = TransformerCoreConfig(
    num_layers=2,
    attention=GroupedQueryConfig(num_heads=2),
    feed_forward=MoEConfig(num_experts=2, hidden_width=16),
    sharing=SharingConfig(modules=FreeSection.of({"attention": "all"}), lora_rank=2),
)
MODELS = {
    "tied table of subwords, rank": ModelConfig(
        48, 32, embedder=TokenEmbedderConfig(rank=8), core=CORE, head=LinearHeadConfig()
    ),
    "shared layers, experts, untied": ModelConfig(
        48, 32, embedder=ByteEmbedderConfig(), core=SHARED, head=LinearHeadConfig(tied=False)
    ),
    "patches": ModelConfig(
        48, 32, embedder=BytePatchEmbedderConfig(width=16, num_heads=2), core=CORE,
        head=BytePatchHeadConfig(num_heads=2),
    ),
}  # fmt: skip


def make(name):
    subwords = isinstance(MODELS[name].embedder, TokenEmbedderConfig)
    tokenizer = train_sentencepiece([sample_text()], 400) if subwords else build_tokenizer("byte")
    return STLM.from_config(MODELS[name], tokenizer, seed=1)


@pytest.mark.parametrize(("name", "bits"), list(zip(MODELS, (8, 6, 4), strict=True)))
def test_a_file_is_the_rounded_model(name, bits, tmp_path):
    model = make(name)
    model.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(sample_text())
    packed = convert_to_artifact(tmp_path / "model", tmp_path / "file", bits, tmp_path / "text.txt")
    assert packed.bytes == (tmp_path / "file").stat().st_size < 4 * model.num_parameters() + 10_000
    assert abs(packed.after - packed.before) < {8: 0.01, 6: 0.03, 4: 0.3}[bits]

    written = STLM.load(tmp_path / "file")
    assert written.config == model.config and written.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert written.num_parameters() == model.num_parameters()  # tied tensors are one tensor again
    for parameter, original in zip(written.parameters(), model.parameters(), strict=True):
        if parameter.ndim == 1:
            assert torch.equal(parameter, original)
    convert_to_artifact(tmp_path / "model", tmp_path / "again", bits, tmp_path / "text.txt")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_nothing_is_rounded_twice(tmp_path):
    """Packing is lossless: levels, steps and vectors are restored exactly."""
    model = make("shared layers, experts, untied")
    matrices = quantize(model, 6, [])
    vectors = {name: vector.detach() for name, vector in model.named_parameters() if vector.ndim == 1}
    data = encode_artifact(describe_model(model.config, model.tokenizer), model.tokenizer, {**vectors, **matrices}, 6)
    found = decode_artifact(data, tmp_path).tensors
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[name], matrix.value()) for name, matrix in matrices.items())
    assert all(torch.equal(found[name], vector) for name, vector in vectors.items())


@pytest.mark.parametrize("size", [15, 255])
def test_integers_come_back_in_no_more_than_their_entropy(size):
    values = np.random.default_rng(1).binomial(size - 1, 0.4, 20_000).astype(np.uint8)
    packed = pack(values, size)
    assert np.array_equal(unpack(memoryview(packed), len(values), size), values)
    share = np.bincount(values)[np.bincount(values) > 0] / len(values)
    assert len(packed) - size < 1.01 * -(share * np.log2(share)).sum() * len(values) / 8 + 8
    for few in (values[:0], values[:1], np.zeros(100, np.uint8)):
        assert np.array_equal(unpack(memoryview(pack(few, size)), len(few), size), few)


def test_calibration_reduces_the_error_of_the_layers_output():
    """Compared with plain rounding, on correlated inputs; on uncorrelated ones there is nothing to gain."""
    generator = torch.Generator().manual_seed(1)
    weight_RC = torch.randn(24, 48, generator=generator)
    x_NC = torch.randn(500, 6, generator=generator) @ torch.randn(6, 48, generator=generator)
    x_NC += 0.1 * torch.randn(500, 48, generator=generator)

    def loss(quantized):
        return ((quantized.value() - weight_RC) @ x_NC.T).square().sum()

    nearest = round_to_nearest(weight_RC, 4)
    assert loss(round_for_inputs(weight_RC, x_NC.T @ x_NC, 4)) < 0.3 * loss(nearest)
    assert torch.equal(round_for_inputs(weight_RC, torch.eye(48), 4).levels, nearest.levels)


@pytest.mark.parametrize("better", ["rounded by GPTQ", "rounded to nearest"])
def test_the_better_rounding_is_taken(better, monkeypatch, tmp_path):
    model = make("patches")
    model.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(sample_text())
    costs = iter([3.0, 1.0, 2.0, 3.0] if better == "rounded by GPTQ" else [3.0, 2.0, 1.0, 3.0])
    monkeypatch.setattr("stlm.export.artifact.conversion.bits_per_byte", lambda model, windows: next(costs))
    packed = convert_to_artifact(tmp_path / "model", tmp_path / "file", 4, tmp_path / "text.txt")
    matrix = dict(STLM.load(tmp_path / "file").named_parameters())["head.project.weight"]
    nearest = round_to_nearest(dict(model.named_parameters())["head.project.weight"], 4).value()
    assert packed.method == better and torch.equal(matrix, nearest) == (better == "rounded to nearest")


# ---------------------------------------------------------------------- texts


def test_a_run_is_calibrated_on_its_own_texts(tmp_path):
    texts = [sample_text()[start : start + 300] for start in range(0, 12_000, 300)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = str(tmp_path / "data")
    prepare(PrepareConfig((str(tmp_path / "text.jsonl"),), output=data, workers=1, validation_fraction=0.2))
    model = make("patches")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    model.save(checkpoint / "model")
    (checkpoint / "COMPLETE").write_text('{"files": {}}')
    config = tmp_path / "run" / "config.yaml"
    config.write_text(dump_run_config(RunConfig(data=DataConfig(dir=data), model=model.config)))

    packed = convert_to_artifact(tmp_path / "run", tmp_path / "file", 6)
    assert "rounded by GPTQ, calibrated on training data" in str(packed)
    assert f"{packed.bytes:,} bytes" in str(packed) and "on validation data" in str(packed)
    subject = Subject.open(tmp_path / "file", data)
    assert subject.model.config == model.config and subject.data is not None

    config.write_text(dump_run_config(RunConfig(data=DataConfig(dir=data + "-gone"), model=model.config)))
    with pytest.raises(ConversionError, match=r"data of the run.* --calibration"):
        convert_to_artifact(tmp_path / "run", tmp_path / "other", 6)
    assert not (tmp_path / "other").exists()
    (tmp_path / "text").write_text(sample_text()[:12_000])
    packed = convert_to_artifact(tmp_path / "run", tmp_path / "other", 6, tmp_path / "text")
    assert f"calibrated on {tmp_path / 'text'}" in str(packed) and f"last tenth of {tmp_path / 'text'}" in str(packed)


def test_a_model_without_texts_is_reported_as_not_calibrated(tmp_path):
    make("patches").save(tmp_path / "model")
    packed = convert_to_artifact(tmp_path / "model", tmp_path / "file", 8)
    assert "rounded to nearest, not calibrated" in str(packed) and "on documentation" in str(packed)
    with pytest.raises(ConversionError, match="exists; expected the name of a new file"):
        convert_to_artifact(tmp_path / "model", tmp_path / "file", 8)
    with pytest.raises(ConversionError, match=r"--calibration: .*absent cannot be read"):
        convert_to_artifact(tmp_path / "model", tmp_path / "new", 8, tmp_path / "absent")


# ---------------------------------------------------------------------- damaged files


def shorten(data):
    return data[:-7], r"has [\d,]+ bytes instead of"


def shorten_to_nothing(data):
    return data[:20], "is not an artifact"


def change(data):
    return data[:-50] + bytes([data[-50] ^ 1]) + data[-49:], "has changed"


def another_version(data):
    return data[:8] + b"\x63" + data[9:], "version 99"


def foreign(data):
    return b"GGUF" + data[4:], "is not an artifact"


@pytest.mark.parametrize("spoil", [shorten, shorten_to_nothing, change, another_version, foreign])
def test_a_damaged_file_is_refused(spoil, tmp_path):
    model = make("patches")
    description = describe_model(model.config, model.tokenizer)
    vectors = {name: vector for name, vector in model.named_parameters() if vector.ndim == 1}
    data = encode_artifact(description, model.tokenizer, {**vectors, **quantize(model, 4, [])}, 4)
    assert data.startswith(MAGIC)
    spoilt, message = spoil(data)
    (tmp_path / "file").write_bytes(spoilt)
    with pytest.raises(CheckpointError, match=message):
        STLM.load(tmp_path / "file")
