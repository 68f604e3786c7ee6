"""Honest counts: a tied parameter is one parameter."""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Unique parameters, embedding included; a shared tensor is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
