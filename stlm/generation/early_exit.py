"""Early exit: an id is drawn from the first exit that is confident enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stlm.generation.interfaces import EarlyExitModel
from stlm.generation.stats import DecodingStats


class EarlyExit:
    """Model for the decoding loop that stops for each id at the first exit that is confident enough.

    An exit is confident if its most probable id has a probability of at least `threshold` (the softmax response of
    CALM: Schuster et al. 2022, arXiv 2207.07061, section 3.5). An id that stopped early waits at its exit; when a later
    one goes deeper, both are run, so the caches of deeper layers are exact. A prompt passes all layers at once.
    """

    def __init__(self, model: EarlyExitModel, threshold: float, stats: DecodingStats) -> None:
        self.model = model
        self.threshold = threshold
        self.stats = stats
        stats.depth = model.depths[-1]

    def begin(self, batch_size: int, ids_BN: Tensor | None = None) -> tuple[Tensor, Any]:
        return self.model.begin(batch_size, ids_BN)

    def join(self, parts: Sequence[tuple[Any, Tensor]]) -> Any:
        return self.model.join(parts)

    def step(self, ids_BN: Tensor, state: Any) -> Tensor:
        if ids_BN.size(1) > 1:
            return self.model.step(ids_BN, state)
        stage, logits_B1V = 0, self.model.draft(ids_BN, state)
        while stage + 1 < len(self.model.depths) and not self._is_confident(logits_B1V):
            stage += 1
            logits_B1V = self.model.deepen(state, stage)
        self.stats.ids += 1
        self.stats.layers += self.model.depths[stage]
        return logits_B1V

    def _is_confident(self, logits_B1V: Tensor) -> bool:
        """Return True if the exit is confident for every row."""
        return bool((logits_B1V.float().softmax(-1).amax(-1) >= self.threshold).all())
