"""The interface of cores, [B, P, D] → [B, P, D], causal over positions, and their registry."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stlm.model.context import Context
from stlm.model.registry import Registry


class Core(nn.Module):
    """Interface of every core. P is T for token models, the number of patches for patch models.

    A core runs in stages. The output of any stage can be passed through `finish` to the head; the ends of stages are
    the exits, and the last is the whole core.
    """

    depths: tuple[int, ...]  # the number of layers run when a stage ends, for each stage
    exit_weights: dict[int, float]  # the same number → weight of the exit's loss; without the last

    def new_cache(self) -> Any:
        """Empty decoding state for `forward(x, context, cache)`."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forget(self, cache: Any, positions: int) -> None:
        """Remove the last `positions` from a cache."""
        raise TypeError(f"{type(self).__name__} defines no forget()")

    def advance(self, x_BPD: Tensor, context: Context, cache: Any, stage: int) -> Tensor:
        """Run one stage on the output of the one before: [B, P, D] → [B, P, D]. P may be 0."""
        raise TypeError(f"{type(self).__name__} defines no advance()")

    def finish(self, x_BPD: Tensor) -> Tensor:
        """Turn the output of any stage into the head's input: [B, P, D] → [B, P, D]."""
        raise TypeError(f"{type(self).__name__} defines no finish()")

    def forward(self, x_BPD: Tensor, context: Context, cache: Any = None) -> Tensor:
        """Transform P positions; with a cache they follow those of earlier calls, and P may be 0."""
        for stage in range(len(self.depths)):
            if stage and context.exits is not None:
                context.exits.append(x_BPD)
            x_BPD = self.advance(x_BPD, context, cache, stage)
        return self.finish(x_BPD)


CORES: Registry[Core] = Registry("core")
