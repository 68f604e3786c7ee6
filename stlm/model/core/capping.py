"""Soft capping of logits and attention scores."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(x / cap): close to x where x is small, within ± cap (Gemma 2, arXiv 2408.00118, section 2).

    Without a cap, return x.
    """
    return x if cap is None else cap * torch.tanh(x / cap)
