"""Configs of blocks: addition of their branches, and layers that are run several times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.plurals import number_of
from stlm.config.yaml.fields import Conflict, setting


@dataclass(frozen=True)
class ResidualConfig:
    """Addition of branch outputs (attention and feed-forward) to the residual stream."""

    parallel: bool = setting(
        False, "attention and feed-forward read the same vectors, and their outputs are added together (GPT-NeoX)"
    )
    scale: float = setting(1.0, "factor of each branch's output", above=0.0)
    learned_scale: bool = setting(False, "learn this factor, one for each element of the vector, starting at scale")


@dataclass(frozen=True)
class LoopsConfig:
    """Depth recurrence: a range of layers is run `count` times in a row (Universal Transformer, arXiv 1807.03819).

    Every pass has its own keys and values. Initial values are scaled for the number of layers run.
    """

    count: int = setting(1, "times that layers first to last are run", unit="passes", minimum=1)
    first: int = setting(0, "first layer of the loop, counted from 0", minimum=0)
    last: int | None = setting(None, "last layer of the loop; null: the last layer of the core", minimum=0)
    embeddings: bool = setting(False, "add a learned vector at the start of each pass, zero at first")

    def order(self, num_layers: int) -> tuple[tuple[int, int | None], ...]:
        """Return (layer, number of the pass) in the order of execution; the number is None except at a pass's start."""
        last = num_layers - 1 if self.last is None else self.last
        before, after = range(self.first), range(last + 1, num_layers)
        passes = [
            (layer, number if layer == self.first else None)
            for number in range(self.count)
            for layer in range(self.first, last + 1)
        ]
        return (*((layer, None) for layer in before), *passes, *((layer, None) for layer in after))

    def check(self, num_layers: int) -> Iterator[Conflict]:
        """Yield the conflicts with the depth, and the settings without effect."""
        last = num_layers - 1 if self.last is None else self.last
        if last >= num_layers:
            yield Conflict(
                "last",
                f"got {last} in a core of {number_of(num_layers, 'layer')}, expected at most {num_layers - 1}",
                ("last",),
            )
        elif self.first > last:
            yield Conflict("first", f"got {self.first}, expected at most {last}, the last layer of the loop", ("last",))
        elif self.count == 1:
            for name in ("first", "last", "embeddings"):
                if getattr(self, name) != getattr(LoopsConfig, name):
                    yield Conflict("count", f"got 1, with which {name} has no effect; expected 2 or more", (name,))
