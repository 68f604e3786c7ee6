"""From logits to an id: temperature, top-k, top-p."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits_BV: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw one id for each row [B] from its `probabilities`."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    return torch.multinomial(probabilities(logits_BV, temperature, top_k, top_p), 1, generator=generator)[:, 0]


def probabilities(
    logits_BV: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """How likely each id is to be drawn [B, V].

    temperature 0 takes the most likely id. `top_k` keeps the k most likely ids; `top_p` keeps the fewest ids whose
    probabilities, largest first, reach p (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751), at least one.
    """
    logits_BV = logits_BV.float()
    if temperature == 0:
        return torch.zeros_like(logits_BV).scatter(-1, logits_BV.argmax(-1, keepdim=True), 1.0)
    # Less the largest, and divided by no less than fp32 can divide by: nothing overflows, however cold it is.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits_BV.size(-1):
        smallest_kept = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability  # mass of the ids ahead of this one: exactly 0 for the first
        dropped = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, (before >= top_p) & (before > 0))
        logits_BV = logits_BV.masked_fill(dropped, -torch.inf)
    return logits_BV.softmax(-1)
