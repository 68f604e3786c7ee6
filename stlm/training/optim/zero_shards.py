"""Layout of the flat tensors that ZeRO passes to the optimizer in place of parameters.

At stages 1 and 2 the parameters of a group are concatenated into one tensor, and each rank holds an equal part of it,
which may begin inside a parameter. At stage 3 each parameter is cut into equal parts, and each rank holds its parts of
a group, concatenated. Stage 0 has no flat tensors: the optimizer gets the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stlm.training.distributed.ranks import Ranks
from stlm.training.distributed.stopwatch import Stopwatch


class ZeroShard(NamedTuple):
    """One rank's part of some parameters, as the optimizer sees it."""

    flat: Tensor
    parameters: list[nn.Parameter]  # those that it holds parts of
    places: list[tuple[int, int]]  # for each, its start, and its size on one rank (stage 3) or in all (1 and 2)
    shapes: list[torch.Size]
    cut_each: bool  # stage 3
    ranks: Ranks
    stopwatch: Stopwatch

    def join(self, flat: Tensor) -> list[Tensor]:
        """Gather `flat`, laid out as this shard, from all ranks. Returns the whole tensors."""
        whole_WN = flat.new_empty(self.ranks.world_size, flat.numel())
        with self.stopwatch.phase("communication"):
            dist.all_gather_into_tensor(whole_WN.view(-1), flat.contiguous())
        whole = []
        for (start, size), shape in zip(self.places, self.shapes, strict=True):
            part = whole_WN[:, start : start + size] if self.cut_each else whole_WN.view(-1)[start : start + size]
            whole.append(part.reshape(-1)[: shape.numel()].view(shape))  # without the last rank's padding
        return whole

    def own_part(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return this rank's flat part of whole tensors that every rank has: the inverse of `join`."""
        ranks = self.ranks.world_size
        whole_WN = torch.zeros(ranks, self.flat.numel(), dtype=self.flat.dtype, device=tensors[0].device)
        for (start, size), tensor in zip(self.places, tensors, strict=True):
            if self.cut_each:
                padded = nn.functional.pad(tensor.reshape(-1), (0, ranks * size - tensor.numel()))
                whole_WN[:, start : start + size] = padded.view(ranks, size)
            else:
                whole_WN.view(-1)[start : start + size] = tensor.reshape(-1)
        return whole_WN[self.ranks.rank]
