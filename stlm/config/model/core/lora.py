"""Config of low-rank corrections, which fine-tuning learns instead of all weights of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, setting


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): W x + (alpha / rank) B A x for each matrix W of the core's attentions
    and feed-forwards. Only A and B learn."""

    rank: int | None = setting(
        None, "rank of the corrections; null: none, all weights are trained", unit="dimensions", minimum=1
    )
    alpha: float | None = setting(None, "corrections are multiplied by alpha / rank; null: by 1", above=0.0)

    targets: str = setting(
        "attention,feed_forward",
        "modules of the core whose matrices are corrected: names separated by commas, such as query,value "
        "or stack.blocks.0",
    )

    @property
    def scale(self) -> float:
        """The factor alpha / rank; 1 where alpha is null."""
        assert self.rank is not None
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        """Yield the conflicts between these settings, and with the width."""
        if self.rank is None and self.alpha is not None:
            yield Conflict(
                "lora.alpha",
                f"got {self.alpha:g}, which has no effect without model.lora.rank; null would work, or also set "
                "model.lora.rank=8",
                ("lora.rank",),
            )
        if self.rank is None and self.targets != LoRAConfig.targets:
            yield Conflict(
                "lora.targets",
                f"got {self.targets!r}, which has no effect without model.lora.rank; leave it out, or "
                "model.lora.rank=8 would work",
                ("lora.rank",),
            )
        if self.rank is not None and self.rank > model.width:
            yield Conflict(
                "lora.rank", f"got {self.rank}, expected at most model.width = {model.width}; 8 would work", ("width",)
            )
