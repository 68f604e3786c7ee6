"""Bits per byte in windows longer than the model was trained on, and calibration of the next id's probability."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data_pipeline.plurals import number_of
from data_pipeline.storage.id_stream import IdStream
from stlm.errors import ConfigError, StlmError
from stlm.evals.measures import calibration_error, confidence_bins
from stlm.evals.report import table
from stlm.stlm import STLM

_LONGEST = 4  # times the context
_WINDOWS = 16


@torch.no_grad()
def bits_by_position(model: STLM, stream: IdStream) -> tuple[str, dict[str, Any]]:
    """Measure bits per byte by the position of an id in its window, up to four times the context.

    Windows are consecutive and each is read in one pass, so the id at position t has exactly t ids before it. Where
    learned positions end with the context, the curve ends there.
    """
    context = model.config.context_length
    length = _LONGEST * context
    try:
        model(torch.zeros(1, length, dtype=torch.long, device=model.device))
    except ConfigError:  # learned positions end with the context
        length = context
    bytes_per_id = torch.from_numpy(model.tokenizer.bytes_per_id)
    nats_T, bytes_T, windows = torch.zeros(length, dtype=torch.double), torch.zeros(length, dtype=torch.double), 0
    for ids_1T in _windows(stream, length):
        logits_TV = model(ids_1T.to(model.device)).logits[0].float()
        nats_T += cross_entropy(logits_TV, ids_1T[0].to(model.device), reduction="none").double().cpu()
        bytes_T += bytes_per_id[ids_1T[0]]
        windows += 1
    if not windows:
        raise StlmError(
            f"extrapolation: the validation text has {number_of(len(stream), 'id')}, expected {length:,} or more; "
            "choose other prepared data with --data"
        )
    edges = sorted({0, *(length >> shift for shift in range(6))})
    rows, curve = [], []
    for start, stop in pairwise(edges):
        bits = (nats_T[start:stop].sum() / math.log(2) / bytes_T[start:stop].sum()).item()
        curve.append({"start": start, "stop": stop, "bits_per_byte": bits})
        rows.append([f"{start:,} to {stop:,}", f"{bits:.4f}", "beyond the context" if start >= context else ""])
    inside = slice(0, context)
    values = {
        "bits_per_byte": (nats_T[inside].sum() / math.log(2) / bytes_T[inside].sum()).item(),
        "context_length": context, "longest": length, "windows": windows, "curve": curve,
    }  # fmt: skip
    return table(rows, ["ids before it", "bits per byte", ""], "rrl"), values


@torch.no_grad()
def next_id_calibration(model: STLM, stream: IdStream) -> tuple[str, dict[str, Any]]:
    """Compare the probability of the most probable id with how often it is the next one."""
    confidences, corrects = [], []
    for ids_1T in _windows(stream, min(model.config.context_length, len(stream))):
        probability_T, best_T = model(ids_1T.to(model.device)).logits[0].float().softmax(-1).max(-1)
        confidences.append(probability_T.cpu().numpy())
        corrects.append((best_T.cpu() == ids_1T[0]).numpy())
    confidence_N, correct_N = np.concatenate(confidences), np.concatenate(corrects).astype(float)
    bin_N = confidence_bins(confidence_N)
    rows, bins = [], []
    for number in np.unique(bin_N):
        in_bin = bin_N == number
        confidence, accuracy = float(confidence_N[in_bin].mean()), float(correct_N[in_bin].mean())
        bins.append({"confidence": confidence, "accuracy": accuracy, "ids": int(in_bin.sum())})
        rows.append([f"{100 * confidence:.1f}", f"{100 * accuracy:.1f}", f"{in_bin.sum():,}"])
    error = calibration_error(confidence_N, correct_N)
    text = table(rows, ["confidence, %", "accuracy, %", "ids"], "rrr")
    text += f"\n\nexpected calibration error {100 * error:.2f} %; "
    text += f"the most probable id is the next one in {100 * correct_N.mean():.1f} %"
    values = {"calibration_error": error, "top_1": float(correct_N.mean()), "ids": len(correct_N), "bins": bins}
    return text, values


def _windows(stream: IdStream, length: int) -> Iterator[Tensor]:
    """Yield up to `_WINDOWS` consecutive windows [1, length] from the beginning of the stream."""
    for start in range(0, min(len(stream) - length + 1, _WINDOWS * length), length):
        yield torch.from_numpy(stream.read(start, start + length)).long()[None]
