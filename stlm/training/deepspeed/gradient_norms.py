"""Gradient norms by part of the model, which show where a diverging loss comes from.

The parts are each layer of the core, the rest of the core, the embedder and the head. A tied tensor counts once, in the
part of its first name. The squared norms of all parts add up to the squared norm of the whole gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stlm.training.optim.zero_shards import ZeroShard


class GradientNorms:
    """Record of the gradients that an optimizer is about to use, at any ZeRO stage.

    `shards`: those of this rank, the `rank`-th; none at stage 0, where every rank has the whole gradient.
    """

    def __init__(self, model: nn.Module, shards: Sequence[ZeroShard], rank: int) -> None:
        part = {p: part_of(name) for name, p in model.named_parameters() if p.requires_grad}
        self.parts = sorted(set(part.values()), key=_order)
        self._places: dict[Tensor, list[tuple[str, Any]]] = {p: [(part[p], ...)] for p in part}
        for shard in shards:
            self._places[shard.flat] = list(_pieces(part, shard, rank))
        self._noted: list[tuple[list[str], Tensor]] = []

    def forget(self) -> None:
        """Clear the record, at the beginning of a step."""
        self._noted.clear()

    def note(self, tensors: Iterable[Tensor]) -> Tensor:
        """Record the gradients of tensors that the optimizer has. Returns the norms of their pieces, as one vector."""
        names, pieces = [], []
        for tensor in tensors:
            if tensor.grad is not None:
                for name, place in self._places[tensor]:
                    names.append(name)
                    pieces.append(tensor.grad[place])
        norms = torch.stack(torch._foreach_norm(pieces)) if pieces else torch.zeros(0)
        self._noted.append((names, norms))
        return norms

    def squares(self) -> list[float]:
        """Return the squared norm of each of `parts`, as far as this rank has recorded it."""
        found: dict[str, list[float]] = defaultdict(list)
        for names, norms in self._noted:
            for name, norm in zip(names, norms.tolist(), strict=True):
                found[name].append(norm * norm)
        return [math.fsum(found[part]) for part in self.parts]


def part_of(name: str) -> str:
    """Name the part of a parameter: core.stack.blocks.3.attention.query → core.stack.blocks.3; core.norm.weight → core;
    embedder.table → embedder."""
    place = name.split(".")
    number = next((index for index, each in enumerate(place) if each.isdecimal()), None)
    return ".".join(place[: number + 1]) if place[0] == "core" and number is not None else place[0]


def _order(part: str) -> tuple[bool, bool, float, str]:
    """Return the sort key of a part: embedder, layers by number, rest of the core (such as its last norm), head."""
    number = part.rpartition(".")[2]
    return part == "head", part != "embedder", int(number) if number.isdecimal() else math.inf, part


def _pieces(part: dict[nn.Parameter, str], shard: ZeroShard, rank: int) -> Iterator[tuple[str, slice]]:
    """Yield the part and the slice of each piece of this rank's flat tensor."""
    first = 0 if shard.cut_each else rank * shard.flat.numel()
    last = first + shard.flat.numel()
    for parameter, (start, size) in zip(shard.parameters, shard.places, strict=True):
        if max(start, first) < min(start + size, last):
            yield part[parameter], slice(max(start, first) - first, min(start + size, last) - first)
