"""Texts for rounding a model: one to calibrate on, one to measure the cost on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.loading.loaders import open_data, train_loader, validation_loader
from data_pipeline.loading.windows import Windows
from data_pipeline.plurals import number_of
from data_pipeline.preparation.options import default_data_dir
from stlm.checkpoints import run_directory
from stlm.config import load_run_config
from stlm.errors import ConversionError
from stlm.export.comparison import sample_text
from stlm.stlm import STLM

CALIBRATION_IDS = 1 << 16
EVALUATION_IDS = 1 << 17
_ROWS = 8  # in a forward pass


@dataclass(frozen=True)
class CalibrationTexts:
    """Windows of the model's context, [n, T]."""

    calibration: Windows | None
    calibration_note: str  # names the calibration text, for people
    evaluation: Windows
    evaluated_on: str  # names the evaluation text

    @classmethod
    def of(cls, model: STLM, source: Path, calibration: str | os.PathLike[str] | None) -> CalibrationTexts:
        """Return the windows to calibrate on and those to measure on.

        With a text file `calibration`: its first nine tenths and its last tenth; no other data is read. Without one:
        training and validation windows of the run that contains the model directory `source`. Where there is no run,
        nothing is calibrated, and the cost is measured on documentation from Python's standard library. Raises
        ConversionError where the file is not text, or the run's data cannot be opened.
        """
        if calibration is not None:
            text = _read(Path(calibration))
            cut = len(text) * 9 // 10
            windows = _spread(_windows_of_text(model, text[:cut]), CALIBRATION_IDS)
            evaluation = _spread(_windows_of_text(model, text[cut:]), EVALUATION_IDS)
            note = f"calibrated on {calibration}, {_size(model, windows)}"
            return cls(windows, note, evaluation, f"the last tenth of {calibration}")
        run_dir = run_directory(source)
        if (run_dir / "config.yaml").is_file():
            windows, evaluation = _windows_of_run(model, run_dir)
            return cls(windows, f"calibrated on training data, {_size(model, windows)}", evaluation, "validation data")
        evaluation = _windows_of_text(model, sample_text())
        return cls(None, "not calibrated", evaluation, "documentation of Python's standard library")


def batches(windows: Windows) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (ids, loss mask, document ids or None), each [B, T]."""
    for first in range(0, len(windows.ids), _ROWS):
        rows = slice(first, first + _ROWS)
        documents = None if windows.document_ids is None else torch.from_numpy(windows.document_ids[rows])
        yield torch.from_numpy(windows.ids[rows]), torch.from_numpy(windows.loss_mask[rows]), documents


@torch.no_grad()
def bits_per_byte(model: STLM, windows: Windows) -> float:
    """Return bits per byte as in validation during training: each window separately, in fp32."""
    bytes_per_id = torch.from_numpy(model.tokenizer.bytes_per_id).long()
    nats, num_bytes = 0.0, 0
    for ids_BT, mask_BT, documents_BT in batches(windows):
        logits_BTV = model(ids_BT, documents_BT).logits.float()
        nats_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT, reduction="none")
        nats += nats_BT[mask_BT].double().sum().item()
        num_bytes += int(bytes_per_id[ids_BT[mask_BT]].sum())
    return nats / math.log(2) / num_bytes


def _windows_of_run(model: STLM, run_dir: Path) -> tuple[Windows, Windows]:
    config = load_run_config(run_dir)
    named = config.data
    if named.dir is None and not named.mixture:
        named = replace(named, dir=str(default_data_dir(model.tokenizer.spec)))
    try:
        data = open_data(named)
    except DataError as error:
        raise ConversionError(
            f"{error}; rounding is calibrated on the data of the run: go to the folder that it was started in, or pass "
            "a text file as --calibration"
        ) from None
    length = model.config.context_length
    number = max(1, CALIBRATION_IDS // length)
    validation = validation_loader(data, named, length)
    indices = np.linspace(0, validation.num_windows - 1, max(1, EVALUATION_IDS // length)).astype(int)
    evaluation = _joined([validation.windows(index, index + 1) for index in np.unique(indices).tolist()])
    return train_loader(data, named, length, number, config.seed).rows(1, 0, number), evaluation


def _windows_of_text(model: STLM, text: str) -> Windows:
    """Return a text as one document in windows, the last one padded."""
    tokenizer, length = model.tokenizer, model.config.context_length
    ids = np.array([tokenizer.end_of_text_id, *tokenizer.encode(text).tolist()], dtype=np.int64)
    padding = -len(ids) % length
    rows = np.pad(ids, (0, padding), constant_values=tokenizer.pad_id).reshape(-1, length)
    mask = np.pad(np.ones(len(ids), np.bool_), (0, padding)).reshape(-1, length)
    return Windows(rows, mask)


def _spread(windows: Windows, num_ids: int) -> Windows:
    """Return evenly spaced windows with at most `num_ids` ids in total."""
    number, length = windows.ids.shape
    places = np.unique(np.linspace(0, number - 1, max(1, num_ids // length)).astype(int))
    return Windows(windows.ids[places], windows.loss_mask[places])


def _joined(parts: list[Windows]) -> Windows:
    documents = [part.document_ids for part in parts if part.document_ids is not None]
    ids, mask = (np.concatenate([part[field] for part in parts]) for field in (0, 1))
    return Windows(ids, mask, np.concatenate(documents) if documents else None)


def _size(model: STLM, windows: Windows) -> str:
    return number_of(int(model.tokenizer.bytes_per_id[windows.ids[windows.loss_mask]].sum()), "byte")


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"--calibration: {path} cannot be read ({error}); expected a text file in UTF-8"
        ) from None
    if len(text) < 1000:
        raise ConversionError(f"--calibration: {path} has {len(text):,} characters, expected at least 1,000")
    return text
