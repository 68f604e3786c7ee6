"""Layers that forget what they computed, and compute it again when the gradient asks for it.

Memory then holds what goes into each layer, and the inside of one layer at a time; a training step runs every layer
twice (Chen et al. 2016, arXiv 1604.06174). Results are the same to the bit: no layer draws random numbers but from the
keys of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stlm.model.context import Context


class Layers(nn.Module):
    """Base of stacks: `recomputes` says whether their layers forget."""

    recomputes = False

    def run_again(self, layer: Callable[..., Tensor], x: Tensor, *inputs: Any) -> Tensor:
        """`layer(x, *inputs)`, forgotten and run again for the gradient if the stack recomputes.

        What the layer tells a `Context` among the inputs is told once.
        """
        if not (self.recomputes and torch.is_grad_enabled()):
            return layer(x, *inputs)
        contexts = [given for given in inputs if isinstance(given, Context)]

        def run(x: Tensor, *values: Tensor | None) -> tuple[Tensor, list[Context]]:
            apart = [context.apart(value) for context, value in zip(contexts, values, strict=True)]
            rest = iter(apart)
            y = layer(x, *(next(rest) if isinstance(given, Context) else given for given in inputs))
            return y, apart

        y, told = checkpoint(
            run, x, *(context.values for context in contexts), use_reentrant=False, preserve_rng_state=False
        )
        for context, part in zip(contexts, told, strict=True):
            context.take(part)
        return y


def recompute_layers(model: nn.Module) -> None:
    """Let all layers of all stacks of the model forget what they compute in training."""
    for module in model.modules():
        if isinstance(module, Layers):
            module.recomputes = True
