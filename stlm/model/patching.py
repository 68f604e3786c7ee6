"""Where byte patches begin. A rule looks only at bytes already read, so that it is causal."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Patches(NamedTuple):
    """What a head needs to come back from patches to bytes (d: width of the byte states)."""

    states_BTd: Tensor  # what the local encoder says at each byte position
    index_BT: Tensor  # the patch of each position: 1 … P for those that began in this call, 0 for the one before
    documents_BP: Tensor | None = None  # the document of each patch, where documents are kept apart


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
