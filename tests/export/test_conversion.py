"""Common to all conversions: equal logits, or nothing is written."""

import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.tokenizers import build_tokenizer
from stlm.config import GroupedQueryConfig, ModelConfig, TransformerCoreConfig
from stlm.errors import CheckpointError, ConversionError
from stlm.export import convert_to
from stlm.export.comparison import TOLERANCE, compare, sample_ids
from stlm.export.formats import TARGETS, ExportFormat
from stlm.stlm import STLM

ROOT = Path(__file__).parents[2]
CORE = TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2))


@pytest.fixture
def model():
    return STLM.from_config(ModelConfig(context_length=48, width=32, core=CORE), build_tokenizer("byte"), seed=1)


@pytest.fixture
def checkpoint(model, tmp_path):
    """Make a run of one checkpoint with a record of its files."""
    path = tmp_path / "run" / "checkpoints" / "step_00000007"
    model.save(path / "model")
    weights = path / "model" / "model.safetensors"
    recorded = {"model/model.safetensors": {"bytes": weights.stat().st_size, "sha256": "0" * 64}}
    (path / "COMPLETE").write_text(json.dumps({"files": {}}))
    (path / "recorded.json").write_text(json.dumps({"files": recorded}))
    return path


def test_a_model_directory_alone_is_the_same_model(checkpoint, model, tmp_path):
    converted = convert_to("safetensors", tmp_path / "run", tmp_path / "new" / "out")
    assert (converted.difference, converted.num_ids) == (0.0, 96)
    assert sorted(path.name for path in converted.output.iterdir()) == ["config.json", "model.safetensors", "tokenizer"]
    ids_BT = sample_ids(model)
    assert torch.equal(STLM.load(converted.output)(ids_BT).logits, model.eval()(ids_BT).logits)
    assert converted.bytes > 4 * converted.parameters == 4 * model.num_parameters()


def test_logits_that_differ_are_refused(model):
    """A difference in any place counts, and NaN is a difference."""
    ids_BT = sample_ids(model)
    right_BTV = model.eval()(ids_BT).logits
    for wrong in (2 * TOLERANCE, -2 * TOLERANCE, float("nan")):
        wrong_BTV = right_BTV.clone()
        wrong_BTV[-1, -1, -1] += wrong
        with pytest.raises(ConversionError, match="nothing was written"):
            compare(model, lambda ids, wrong_BTV=wrong_BTV: wrong_BTV)
    with pytest.raises(ConversionError, match="shape"):
        compare(model, lambda ids: right_BTV[..., :-1])
    assert compare(model, lambda ids: right_BTV + TOLERANCE / 2)[0] == pytest.approx(TOLERANCE / 2, rel=0.01)


def test_a_failed_conversion_leaves_nothing(checkpoint, monkeypatch, tmp_path):
    def write(model, origin, folder):
        (folder / "half").write_text("half")
        return lambda ids_BT: model(ids_BT).logits + 1

    monkeypatch.setitem(TARGETS, "broken", ExportFormat(lambda config: [], write))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError, match=r"differ by up to 1\.00e\+00"):
        convert_to("broken", checkpoint, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_unsupported_settings_are_named_with_targets_that_support_them(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setitem(TARGETS, "narrow", ExportFormat(lambda config: [f"model.width = {config.width}"], None))
    with pytest.raises(ConversionError, match=r"narrow cannot express model\.width = 32; .* converted to safetensors"):
        convert_to("narrow", checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def occupy_with_file(output, checkpoint):
    output.write_text("mine")


def occupy_with_folder(output, checkpoint):
    output.mkdir()
    (output / "mine").write_text("mine")


def occupy_with_broken_link(output, checkpoint):
    output.symlink_to(output.parent / "nowhere")


def truncate(output, checkpoint):
    weights = checkpoint / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def change(output, checkpoint):
    (checkpoint / "recorded.json").rename(checkpoint / "COMPLETE")


def unfinished(output, checkpoint):
    (checkpoint / "COMPLETE").unlink()


def foreign(output, checkpoint):
    (checkpoint / "model" / "config.json").write_text('{"model_type": "llama"}')


def no_tokenizer(output, checkpoint):
    shutil.rmtree(checkpoint / "model" / "tokenizer")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (occupy_with_file, ConversionError, "not a folder"),
        (occupy_with_folder, ConversionError, "is a folder that is not empty"),
        (occupy_with_broken_link, ConversionError, "not a folder"),
        (truncate, CheckpointError, "damaged"),
        (change, CheckpointError, "sha256"),
        (unfinished, CheckpointError, "never finished"),
        (foreign, CheckpointError, "not written by stlm"),
        (no_tokenizer, (CheckpointError, DataError), "tokenizer"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(spoil, error, message, checkpoint, tmp_path):
    output = tmp_path / "out"
    spoil(output, checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        convert_to("safetensors", checkpoint, output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs convert_checkpoint.py in this process and returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / "scripts" / "convert_checkpoint.py"), run_name="__main__")
        return ending.value.code or 0, *capsys.readouterr()

    return call


def test_the_command_reports_its_output_and_refuses_to_overwrite_it(call, checkpoint, model, tmp_path):
    command = (tmp_path / "run", "--to", "safetensors", "--output", tmp_path / "out")
    code, out, _ = call(*command)
    assert code == 0
    assert f"{model.num_parameters():,} parameters" in out
    assert "largest difference of logits: 0.0e+00, on 96 ids of text" in out
    code, out, err = call(*command)
    assert (code, out) == (2, "") and "is a folder that is not empty" in err


def test_the_command_reads_other_formats_and_refuses_unknown_ones(call, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: the extra `export`")
    code, out, err = call(tmp_path / "nothing", "--from", "huggingface", "--output", tmp_path / "out")
    assert (code, out) == (2, "") and "holds no config.json" in err
    assert not (tmp_path / "out").exists()
    assert call(tmp_path, "--from", "huggingface", "--to", "safetensors", "--output", tmp_path / "out")[0] == 2
