"""Activation checkpointing: layers discard their activations and recompute them in the backward pass.

Memory then holds the inputs of all layers and the activations of one layer at a time; a training step runs every layer
twice (Chen et al. 2016, arXiv 1604.06174). Results are bit-equal: layers draw random numbers from the keys of rows
only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stlm.model.context import Context


class Layers(nn.Module):
    """Base of stacks. With `recomputes`, their layers discard activations and recompute them."""

    recomputes = False

    def run_again(self, layer: Callable[..., Tensor], x: Tensor, *inputs: Any) -> Tensor:
        """Return `layer(x, *inputs)`; if the stack recomputes, run the layer again in the backward pass.

        Terms and measures that the layer adds to a `Context` among the inputs are added once.
        """
        if not (self.recomputes and torch.is_grad_enabled()):
            return layer(x, *inputs)
        contexts = [given for given in inputs if isinstance(given, Context)]

        def run(x: Tensor, *values: Tensor | None) -> tuple[Tensor, list[Context]]:
            apart = [context.apart(value) for context, value in zip(contexts, values, strict=True)]
            rest = iter(apart)
            y = layer(x, *(next(rest) if isinstance(given, Context) else given for given in inputs))
            return y, apart

        y, copies = checkpoint(
            run, x, *(context.values for context in contexts), use_reentrant=False, preserve_rng_state=False
        )
        for context, part in zip(contexts, copies, strict=True):
            context.take(part)
        return y


def recompute_layers(model: nn.Module) -> None:
    """Turn on recomputation in all stacks of the model."""
    for module in model.modules():
        if isinstance(module, Layers):
            module.recomputes = True
