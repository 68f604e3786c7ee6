"""Are two models the same? The largest difference of their logits on a text that every Python machine carries."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable

import torch
from torch import Tensor

from stlm.errors import ConversionError
from stlm.stlm import STLM

TOLERANCE = 1e-4  # in fp32; what sums of another order differ by is some hundred times less
RELATIVE = 1e-5  # the same where logits are beyond ± 10, as those of GPT-2 are: of the largest of them
ROWS = 2

Logits = Callable[[Tensor], Tensor]  # ids [B, T] → logits [B, T, V] of each of them, given those before it


def sample_text() -> str:
    """Some thousand characters of English about Python, and a line of what is harder to encode."""
    prose = "\n\n".join(module.__doc__ or "" for module in (json, re, argparse))
    return f"{prose}\n\nnaïve café · 12,345 — “quotes” <0x41> Привет, 日本語 🙂\t\r\n   end\n"


def sample_ids(model: STLM) -> Tensor:
    """The text as windows of the model's context: [B, T], B at most 2."""
    tokenizer, length = model.tokenizer, model.config.context_length
    ids = torch.tensor([tokenizer.end_of_text_id, *tokenizer.encode(sample_text()).tolist()])
    rows = min(ROWS, len(ids) // length)
    return ids[: rows * length].view(rows, length) if rows else ids[None]


@torch.no_grad()
def compare(model: STLM, other: Logits) -> tuple[float, int]:
    """The largest difference between the logits of both, and the number of ids that they were compared on.

    Raises ConversionError where it is more than TOLERANCE and RELATIVE allow, or no number.
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
            f"the converted model is not the same: its logits differ by up to {difference:.2e}, expected at most "
            f"{allowed:.0e}; nothing was written"
        )
    return difference, ids_BT.numel()
