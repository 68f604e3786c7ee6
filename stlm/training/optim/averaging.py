"""An exponential moving average of the weights, which is often better than the last of them (Polyak & Juditsky 1992;
Izmailov et al. 2018, arXiv 1803.05407).

It stands among the optimizer's own state, beside the moments, so that it is cut, saved and restored as they are, at
every ZeRO stage. It begins with the weights of the first update, and early on keeps only (1 + t) / (10 + t) of itself,
so that they do not stay in it.
"""

from __future__ import annotations

from typing import Any

import torch

AVERAGE = "ema"  # its name among the moments


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """From now on, every update is followed by one of the average. `optimizer` keeps a `step` for each parameter."""

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
