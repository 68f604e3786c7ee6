"""Logits that cannot run away."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap): close to x where it is small, never beyond ± cap (Gemma 2, arXiv 2408.00118, section 2).

    Without a cap, x itself.
    """
    return x if cap is None else cap * torch.tanh(x / cap)
