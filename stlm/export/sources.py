"""Formats that models are read from, besides this project's own checkpoints, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stlm.export.comparison import Logits
from stlm.export.huggingface.reader import read_huggingface
from stlm.stlm import STLM


@dataclass(frozen=True)
class ImportForm:
    """One format of a model on disk."""

    read: Callable[[Path], tuple[STLM, Logits]]  # returns the model of a folder, and the original's logits


SOURCES = {"huggingface": ImportForm(read_huggingface)}
