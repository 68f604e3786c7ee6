"""Export as model.onnx for ONNX Runtime and similar programs: ids to logits of the next id, for batches of any size and
texts of any length up to the context."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import first_line
from data_pipeline.extras import how_to_install
from stlm.config import ByteEmbedderConfig, ModelConfig, TokenEmbedderConfig, value_at
from stlm.errors import ConversionError
from stlm.export.comparison import Logits
from stlm.export.huggingface.writer import shift_right, write_tokenizer
from stlm.export.origin import Origin
from stlm.model import Context
from stlm.stlm import STLM

FILE = "model.onnx"


class ExportedGraph(nn.Module):
    """The exported graph: ids [B, T], the start symbol first → logits [B, T, V] of the id after each."""

    def __init__(self, model: STLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.read(input_ids, Context()).logits


def onnx_obstacles(config: ModelConfig) -> list[str]:
    """Return the settings that no fixed graph can express: shapes or weights that depend on the ids or their number.

    These are patches, experts, and attention windows, whose number of blocks depends on the length.
    """
    found = []
    if not isinstance(config.embedder, TokenEmbedderConfig | ByteEmbedderConfig):
        found.append("embedder.kind")
    if value_at(config, "core.feed_forward.kind") == "moe":
        found.append("core.feed_forward.kind")
    if value_at(config, "core.attention.window") is not None:
        found.append("core.attention.window")
    return [f"model.{key} = {value_at(config, key)}" for key in found]


def write_onnx(model: STLM, origin: Origin, folder: Path) -> Logits:
    """Write the graph and the tokenizer's files into a folder; see `ExportFormat`."""
    runtime = _import_onnxruntime()
    length = model.config.context_length
    if length < 3:
        raise ConversionError(f"model.context_length: got {length}, expected at least 3 for --to onnx")
    dimensions = {
        0: torch.export.Dim("batch", min=1, max=1 << 16),
        1: torch.export.Dim("length", min=2, max=length),
    }
    example = torch.full((2, length // 2 + 1), model.tokenizer.end_of_text_id)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                ExportedGraph(model).eval(), (example,), dynamo=True, verbose=False, optimize=True,
                input_names=["input_ids"], output_names=["logits"], dynamic_shapes={"input_ids": dimensions},
            )  # fmt: skip
            program.save(folder / FILE)
    except Exception as error:  # the exporter raises no narrower class
        raise ConversionError(
            f"onnx: torch cannot export this model ({first_line(error)}); nothing was written"
        ) from None
    write_tokenizer(model, folder)
    session = runtime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])

    def logits(ids_BT: Tensor) -> Tensor:
        (found,) = session.run(None, {"input_ids": shift_right(ids_BT, model.tokenizer).numpy()})
        return torch.from_numpy(found)

    return logits


def _import_onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401 (torch needs both)
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        install = how_to_install("onnx", "onnxscript", "onnxruntime")
        raise ConversionError(f"onnx: {error.name} is not installed: {install}") from None
    return onnxruntime


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence the exporter's logs and warnings."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
