"""Config of the published byte model's head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.embedders.published import PublishedEmbedderConfig
from stlm.config.model.heads.base import HeadConfig
from stlm.config.model.shape import ModelShape, heads_fit
from stlm.config.yaml.fields import Conflict, register, setting


@register("paper")
@dataclass(frozen=True)
class PublishedHeadConfig(HeadConfig):
    """Prediction of all bytes of the next id at once, by a small bidirectional transformer as in the embedder."""

    num_layers: int = setting(2, "layers over the bytes of an id", unit="layers", minimum=0)
    num_heads: int = setting(
        4, "attention heads of a layer over bytes", unit="heads", minimum=1, needs=("num_layers", 1)
    )

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        embedder = model.embedder
        if isinstance(embedder, PublishedEmbedderConfig):
            yield from heads_fit("head.num_heads", self.num_heads, "embedder.width", embedder.width)
        else:
            head = "byte_patch" if embedder.patched else "linear"
            yield Conflict(
                "head.kind",
                f"got {self.kind!r}, which needs the embedder 'paper', expected a head for the embedder "
                f"{embedder.kind!r}; model.head={{kind: {head}}} would work",
                ("embedder.kind",),
            )
