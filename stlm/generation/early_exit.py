"""Early exit: an id for which the first layers are sure enough is drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from stlm.generation.effort import Effort
from stlm.generation.steppable import Steppable


class Deepening(Steppable, Protocol):
    """What early exit needs of a model."""

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers behind which one may stop, the last of them being all."""
        ...

    def draft(self, ids_B1: Tensor, state: Any) -> Tensor:
        """Read one more id through the layers in front of the first exit; its logits [B, 1, V]."""
        ...

    def deepen(self, state: Any, stage: int) -> Tensor:
        """Bring that id, and those that wait there, to the next exit, `stage`; its logits [B, 1, V]."""
        ...


class EarlyExit:
    """The model as the decoding loop sees it, stopping for each id at the first exit that is sure enough.

    Sure is an exit that gives its likeliest id a probability of at least `threshold` (the softmax response of CALM:
    Schuster et al. 2022, arXiv 2207.07061, section 3.5). An id that stopped early waits there: should a later one go
    deeper, it is taken along, so that what deeper layers remember is exact. A prompt passes all layers at once.
    """

    def __init__(self, model: Deepening, threshold: float, effort: Effort) -> None:
        self.model = model
        self.threshold = threshold
        self.effort = effort
        effort.depth = model.depths[-1]

    def begin(self, batch_size: int, ids_BN: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.model.begin(batch_size, ids_BN)

    def join(self, parts: Sequence[tuple[Any, Tensor]]) -> Any:
        return self.model.join(parts)

    def step(self, ids_BN: Tensor, state: Any) -> Tensor:
        if ids_BN.size(1) > 1:
            return self.model.step(ids_BN, state)
        stage, logits_B1V = 0, self.model.draft(ids_BN, state)
        while stage + 1 < len(self.model.depths) and not self._sure(logits_B1V):
            stage += 1
            logits_B1V = self.model.deepen(state, stage)
        self.effort.ids += 1
        self.effort.layers += self.model.depths[stage]
        return logits_B1V

    def _sure(self, logits_B1V: Tensor) -> bool:
        """Of every row."""
        return bool((logits_B1V.float().softmax(-1).amax(-1) >= self.threshold).all())
