"""Exponential moving average of the weights, which is often better than the last weights (Polyak & Juditsky 1992;
Izmailov et al. 2018, arXiv 1803.05407).

The average is part of the optimizer's state, like the moments, so it is sharded, saved and restored with them at every
ZeRO stage. It starts from the weights after the first update. After t updates its decay is at most (1 + t) / (10 + t),
so that it soon forgets them.
"""

from __future__ import annotations

from typing import Any

import torch

AVERAGE = "ema"  # key in the optimizer's state


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Update the average after every step of `optimizer`, whose state needs a `step` for each parameter."""

    @torch.no_grad()
    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                entry = optimizer.state.get(parameter)
                if not entry:
                    continue
                if AVERAGE not in entry:
                    entry[AVERAGE] = parameter.detach().clone()
                updates = float(entry["step"])
                entry[AVERAGE].lerp_(parameter, 1 - min(decay, (1 + updates) / (10 + updates)))

    optimizer.register_step_post_hook(follow)
