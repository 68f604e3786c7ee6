"""Formats that models are converted to and from, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stlm.config import ModelConfig
from stlm.export.comparison import Logits
from stlm.export.huggingface.families import obstacles
from stlm.export.huggingface.reader import read_huggingface
from stlm.export.huggingface.writer import write_huggingface
from stlm.export.onnx import onnx_obstacles, write_onnx
from stlm.export.origin import Origin
from stlm.stlm import STLM


@dataclass(frozen=True)
class ExportFormat:
    """A format that models are converted to."""

    obstacles: Callable[[ModelConfig], list[str]]  # settings it cannot express, as "key = value"; none: it fits
    write: Callable[[STLM, Origin, Path], Logits]  # writes a folder, and returns the logits of the model read back


@dataclass(frozen=True)
class ImportFormat:
    """A format that models are converted from."""

    read: Callable[[Path], tuple[STLM, Logits]]  # returns the model of a folder, and the original's logits


def write_model_directory(model: STLM, origin: Origin, folder: Path) -> Logits:
    """Write only the model directory: config.json, model.safetensors and tokenizer/, as in a checkpoint."""
    model.save(folder)
    written = STLM.load(folder).eval()
    return lambda ids_BT: written(ids_BT).logits


TARGETS = {
    "safetensors": ExportFormat(lambda config: [], write_model_directory),
    "huggingface": ExportFormat(lambda config: [], write_huggingface),
    "onnx": ExportFormat(onnx_obstacles, write_onnx),
}


SOURCES = {"huggingface": ImportFormat(read_huggingface)}


def supported_formats(config: ModelConfig, directory: Path) -> list[str]:
    """Return the names of --to that can express a model, which lies in a model directory."""
    fitting = [name for name, target in TARGETS.items() if not target.obstacles(config)]
    fitting += [] if obstacles(config) else ["gguf"]
    fitting += ["artifact"]
    if (directory.parent / "state.json").is_file():  # of a checkpoint, which holds moments as well
        fitting += ["deepspeed", "universal"]
    return fitting
