"""What drawing ids has cost, where it does not cost the same for every id."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.plurals import number_of


@dataclass
class Effort:
    """Counts of what was drawn, reading prompts not included. A layer counts once whenever it is run, however many
    positions pass it at that time: one id at a time, a layer takes as long for several as for one, or nearly so."""

    depth: int = 0  # layers of the model
    ids: int = 0  # drawn and kept
    layers: int = 0  # run
    drafted: int = 0  # ids drawn from the first layers, by speculation
    accepted: int = 0  # of those

    @property
    def mean_depth(self) -> float:
        """Layers run for each id."""
        return self.layers / max(1, self.ids)

    def __str__(self) -> str:
        saved = 1 - self.mean_depth / self.depth if self.depth else 0.0
        ids, layers = number_of(self.ids, "id"), number_of(self.depth, "layer")
        text = f"{ids}, {self.mean_depth:.2f} of {layers} run for each: {saved:.0%} saved"
        return text + (f"; {self.accepted} of {number_of(self.drafted, 'draft')} accepted" if self.drafted else "")
