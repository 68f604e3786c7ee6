"""Decoding statistics: layers run and drafts accepted."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.plurals import number_of


@dataclass
class DecodingStats:
    """Counts of ids drawn and layers run, without reading prompts. A layer counts once each time it is run, whatever
    the number of positions: in decoding, a layer takes nearly as long for one position as for several."""

    depth: int = 0  # layers of the model
    ids: int = 0  # drawn and kept
    layers: int = 0  # run
    drafted: int = 0  # ids drawn from the first layers, by speculation
    accepted: int = 0  # drafted ids that were accepted

    @property
    def mean_depth(self) -> float:
        """Mean number of layers run for an id."""
        return self.layers / max(1, self.ids)

    def __str__(self) -> str:
        saved = 1 - self.mean_depth / self.depth if self.depth else 0.0
        ids, layers = number_of(self.ids, "id"), number_of(self.depth, "layer")
        text = f"{ids}; {self.mean_depth:.2f} of {layers} run per id ({saved:.0%} saved)"
        return text + (f"; {self.accepted} of {number_of(self.drafted, 'draft')} accepted" if self.drafted else "")
