"""Quantization of matrices to small integers; groups of entries of a row share a step.

Shape letters: R rows, C columns, G groups of a row. Tensors of more than two dimensions are flattened to [R, C].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = (8, 6, 4)
RATIOS = 255  # a step is stored as a multiple of 1 / RATIOS of the tensor's largest step

GROUP = 128  # columns that share a step; a row's last group may be shorter; docs/LOG.md compares sizes


class Quantized(NamedTuple):
    """Quantized tensor: entry = level x step of its group."""

    levels: Tensor  # int8, the tensor's own shape: at most `largest_level(bits)` in size
    ratios: Tensor  # uint8 [R, G]: the steps in multiples of `unit`
    unit: float  # the largest step over RATIOS, a number of 32 bits

    def value(self) -> Tensor:
        """Return the tensor in fp32, bit-equal on every machine: two products of 32-bit numbers."""
        steps_RC = spread(steps_of(self.ratios, self.unit), self.levels.size(-1))
        return (self.levels.flatten(0, -2).float() * steps_RC).view(self.levels.shape)


def is_quantized(parameter: Tensor) -> bool:
    """Return True for matrices and tables; vectors, such as the scales of norms, are small and stay fp32."""
    return parameter.ndim > 1


def largest_level(bits: int) -> int:
    """Return the largest level, 127, 31 or 7. Levels are symmetric about zero."""
    return 2 ** (bits - 1) - 1


def choose_steps(weight_RC: Tensor, bits: int) -> tuple[Tensor, float]:
    """Choose steps (ratios_RG, unit), rounded up so that each group's largest entry is at most the largest level."""
    padded_RC = torch.nn.functional.pad(weight_RC.detach().float().abs(), (0, -weight_RC.size(1) % GROUP))
    steps_RG = padded_RC.unflatten(1, (-1, GROUP)).amax(2) / largest_level(bits)
    unit = max((steps_RG.amax() / RATIOS).item(), torch.finfo(torch.float32).tiny)
    return (steps_RG / unit).ceil().clamp(1, RATIOS).to(torch.uint8), unit


def steps_of(ratios_RG: Tensor, unit: float) -> Tensor:
    """Return the steps [R, G] in fp32."""
    return ratios_RG.float() * torch.tensor(unit, dtype=torch.float32, device=ratios_RG.device)


def spread(steps_RG: Tensor, columns: int) -> Tensor:
    """Repeat steps for each column: [R, G] → [R, C]."""
    return steps_RG.repeat_interleave(GROUP, 1)[:, :columns]


def nearest_levels(weight_RC: Tensor, steps_RC: Tensor, bits: int) -> Tensor:
    """Return the integers nearest to weight / step, as floats."""
    top = largest_level(bits)
    return (weight_RC / steps_RC).round().clamp(-top, top)


def round_to_nearest(weight: Tensor, bits: int) -> Quantized:
    """Quantize a tensor, each entry rounded to the nearest level."""
    weight_RC = weight.detach().float().flatten(0, -2)
    ratios_RG, unit = choose_steps(weight_RC, bits)
    steps_RC = spread(steps_of(ratios_RG, unit), weight_RC.size(1))
    levels_RC = nearest_levels(weight_RC, steps_RC, bits).to(torch.int8)
    return Quantized(levels_RC.view(weight.shape), ratios_RG, unit)
