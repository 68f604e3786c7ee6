"""Comparison of two models: the largest difference of their logits on a text from Python's standard library."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable

import torch
from torch import Tensor

from stlm.errors import ConversionError
from stlm.stlm import STLM

TOLERANCE = 1e-4  # in fp32; another order of summation gives differences about a hundred times smaller
RELATIVE = 1e-5  # relative to the largest logit, which matters beyond ± 10, as in GPT-2
ROWS = 2

Logits = Callable[[Tensor], Tensor]  # ids [B, T] → logits [B, T, V] of each id, given those before it


def sample_text() -> str:
    """Return several thousand characters of English about Python, and a line that is harder to encode."""
    prose = "\n\n".join(module.__doc__ or "" for module in (json, re, argparse))
    return f"{prose}\n\nnaïve café · 12,345 — “quotes” <0x41> Привет, 日本語 🙂\t\r\n   end\n"


def sample_ids(model: STLM) -> Tensor:
    """Return the ids of the sample text in windows of the model's context: [B, T], B at most 2."""
    tokenizer, length = model.tokenizer, model.config.context_length
    ids = torch.tensor([tokenizer.end_of_text_id, *tokenizer.encode(sample_text()).tolist()])
    rows = min(ROWS, len(ids) // length)
    return ids[: rows * length].view(rows, length) if rows else ids[None]


@torch.no_grad()
def compare(model: STLM, other: Logits) -> tuple[float, int]:
    """Return the largest difference between the logits of both, and the number of ids that were compared.

    Raises ConversionError where it exceeds TOLERANCE and RELATIVE, or is NaN.
    """
    ids_BT = sample_ids(model)
    model.eval()
    expected_BTV, got_BTV = model(ids_BT).logits.float(), other(ids_BT).float()
    if got_BTV.shape != expected_BTV.shape:
        raise ConversionError(
            f"the converted model gives logits of shape {list(got_BTV.shape)}, expected {list(expected_BTV.shape)}; "
            "nothing was written"
        )
    difference = (got_BTV - expected_BTV).abs().max().item()
    allowed = max(TOLERANCE, RELATIVE * expected_BTV.abs().max().item())
    if not difference <= allowed:
        raise ConversionError(
            f"the converted model differs: its logits differ by up to {difference:.2e}, expected at most "
            f"{allowed:.0e}; nothing was written"
        )
    return difference, ids_BT.numel()
