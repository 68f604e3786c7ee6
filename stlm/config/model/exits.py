"""Config of early exits: layers of a core that the head may read in addition to the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.yaml.fields import Conflict, setting


@dataclass(frozen=True)
class ExitsConfig:
    """Exits at equal distances. All of them use the model's final norm and head, so exits have no weights of their own.

    In training each row learns from the last layer and from one exit, drawn again at every step (as in the rotating
    curriculum of LayerSkip, arXiv 2404.16710, section 3.2). This costs one more pass through the head, whatever the
    number of exits. Loss weights grow with depth l as l (l + 1), as in LayerSkip.
    """

    every: int | None = setting(None, "layers from one exit to the next; null: no exits", unit="layers", minimum=1)
    loss_weight: float = setting(
        0.3, "weight of all exits together in the loss; the last layer has weight 1", above=0.0
    )

    def weights(self, depth: int) -> dict[int, float]:
        """Return the loss weight of each exit, by the number of layers before it; without the last layer."""
        places = range(self.every, depth, self.every) if self.every else ()
        total = sum(place * (place + 1) for place in places)
        return {place: self.loss_weight * place * (place + 1) / total for place in places}

    def check(self, depth: int) -> Iterator[Conflict]:
        """Yield the conflicts with the number of layers that are run."""
        works = f"model.core.exits.every={max(1, depth // 2)}" if depth > 1 else "model.core.num_layers=2"
        if self.every is not None and self.every >= depth:
            yield Conflict(
                "every",
                f"got {self.every}, which leaves no exit before the last layer, expected less than {depth}, the "
                f"number of layers run; {works} would work",
            )
        if self.every is None and self.loss_weight != ExitsConfig.loss_weight:
            yield Conflict(
                "loss_weight",
                f"got {self.loss_weight:g}, which has no effect without exits; {works} would work",
                ("every",),
            )
