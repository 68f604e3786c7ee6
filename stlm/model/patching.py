"""Where byte patches begin. A rule looks only at bytes already read, so that it is causal."""

from __future__ import annotations

import torch
from torch import Tensor


class FixedPatching:
    """A patch begins at every `size`-th position (MegaByte: Yu et al. 2023, arXiv 2305.07185)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def first_start(self, offset: int) -> int:
        """How many positions after position `offset` the next patch begins: 0 … size - 1."""
        return -offset % self.size

    def patch_index(self, length: int, offset: int, device: torch.device) -> Tensor:
        """For positions offset … offset + length - 1 [length]: which patch that *began in this range* each belongs to,
        counted from 1; 0 is the patch that was under way before it."""
        position = torch.arange(offset, offset + length, device=device)
        began_before = -(-offset // self.size)
        return position // self.size - began_before + 1
