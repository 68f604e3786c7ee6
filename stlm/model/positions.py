"""Positions: how attention knows the order of what it sees.

Shape letters: B batch, T positions, N heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stlm.config import RoPEConfig
from stlm.model.registry import Registry


class RotaryTable(NamedTuple):
    """Of T positions, [T, K] each, float32."""

    cosine: Tensor
    sine: Tensor


class Positions(nn.Module):
    """Interface of every kind of positions. One serves all layers of a stack."""

    def rotary(self, first: int, length: int, device: torch.device) -> RotaryTable:
        """By what the queries and keys at positions first, first + 1, … are turned."""
        raise TypeError(f"{type(self).__name__} defines no rotary()")


POSITIONS: Registry[Positions] = Registry("core.positions")


@POSITIONS.register("rope")
class RoPE(Positions):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): scores depend on distances alone."""

    def __init__(self, config: RoPEConfig, head_width: int) -> None:
        super().__init__()
        self.theta, self.head_width = config.theta, head_width

    def rotary(self, first: int, length: int, device: torch.device) -> RotaryTable:
        return rotary_table(first, length, self.head_width, self.theta, device)


def rotary_table(first: int, length: int, head_width: int, theta: float, device: torch.device) -> RotaryTable:
    """Cosines and sines [length, head_width] of positions first, first + 1, …"""
    frequency = theta ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    position = torch.arange(first, first + length, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency).repeat(1, 2)
    return RotaryTable(angle.cos(), angle.sin())


def rotate(x_BNTK: Tensor, table: RotaryTable) -> Tensor:
    """Turn each pair (k, k + K/2) by its position's angle. Computed in float32, returned in x's dtype."""
    left, right = x_BNTK.chunk(2, dim=-1)
    return (x_BNTK * table.cosine + torch.cat((-right, left), dim=-1) * table.sine).to(x_BNTK.dtype)
