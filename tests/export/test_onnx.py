"""ONNX Runtime computes the same, on batch sizes and lengths other than those of the export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import (
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    GroupedQueryConfig,
    ModelConfig,
    MoEConfig,
    TransformerCoreConfig,
    load_run_config,
)
from stlm.errors import ConversionError
from stlm.export import convert_to
from stlm.export.onnx import ExportedGraph, onnx_obstacles
from stlm.stlm import STLM

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
CORE = TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=4, num_kv_heads=2))
PLAIN = ModelConfig(context_length=300, width=32, core=CORE)


def test_batches_and_lengths_are_free(tmp_path):
    """Lengths include those for which attention is computed in a different way."""
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: the extra `export`")
    model = STLM.from_config(PLAIN, build_tokenizer("byte"), seed=2)
    model.save(tmp_path / "model")
    converted = convert_to("onnx", tmp_path / "model", tmp_path / "out")
    assert converted.difference <= 1e-5
    session = runtime.InferenceSession(converted.output / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 17), (1, 256), (2, 300)):
        ids_BT = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))
        (found,) = session.run(["logits"], {"input_ids": ids_BT.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), ExportedGraph(model.eval())(ids_BT), atol=1e-5, rtol=0)
    assert json.loads((converted.output / "tokenizer.json").read_text())["model"]["type"] == "BPE"


OTHERS = {
    "model.embedder.kind = byte_patch": replace(PLAIN, embedder=BytePatchEmbedderConfig(), head=BytePatchHeadConfig()),
    "model.core.feed_forward.kind = moe": replace(PLAIN, core=replace(CORE, feed_forward=MoEConfig())),
    "model.core.attention.window = 8": replace(PLAIN, core=replace(CORE, attention=GroupedQueryConfig(window=8))),
}


@pytest.mark.parametrize("obstacle", OTHERS)
def test_an_unsupported_setting_is_named(obstacle, tmp_path):
    assert onnx_obstacles(PLAIN) == []
    STLM.from_config(OTHERS[obstacle], build_tokenizer("byte")).save(tmp_path / "model")
    forms = "safetensors or huggingface or artifact$"
    with pytest.raises(ConversionError, match=f"onnx cannot express {obstacle}; .* to {forms}"):
        convert_to("onnx", tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["10m-token", STUDIES / "tying-lora-all-deep-small.yaml"])
def test_small_versions_of_configs_are_expressed(config, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: the extra `export`")
    small = ["model.width=32", "model.context_length=64", "model.core.num_layers=3", "model.core.attention.num_heads=4"]
    STLM.from_config(load_run_config(config, small).model, build_tokenizer("byte"), seed=1).save(tmp_path / "model")
    assert convert_to("onnx", tmp_path / "model", tmp_path / "out").difference <= 1e-5
