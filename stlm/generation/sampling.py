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
    """Draw one id for each row [B].

    temperature 0 takes the most likely id. `top_k` keeps the k most likely ids; `top_p` keeps the fewest ids whose
    probabilities, largest first, reach p (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751), at least one.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.float()
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
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
