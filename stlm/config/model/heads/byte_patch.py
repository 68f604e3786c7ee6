"""Config of the head of byte patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.embedders.byte_patch import BytePatchEmbedderConfig
from stlm.config.model.heads.base import HeadConfig, logit_cap_setting
from stlm.config.model.shape import ModelShape, heads_fit
from stlm.config.yaml.fields import Conflict, register, setting


@register("byte_patch")
@dataclass(frozen=True)
class BytePatchHeadConfig(HeadConfig):
    """A small local transformer that decodes each patch byte by byte, with the width of the embedder's local layers."""

    num_layers: int = setting(1, "local layers", unit="layers", minimum=1)
    num_heads: int = setting(2, "attention heads of a local layer", unit="heads", minimum=1)
    window: int = setting(
        32, "bytes that local attention reaches back over, the current one included", unit="bytes", minimum=1
    )
    logit_cap: float | None = logit_cap_setting()

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        embedder = model.embedder
        if isinstance(embedder, BytePatchEmbedderConfig):
            yield from heads_fit("head.num_heads", self.num_heads, "embedder.width", embedder.width)
        else:
            yield Conflict(
                "head.kind",
                f"got {self.kind!r}, which needs patches, expected a head for the embedder {embedder.kind!r}; "
                "model.head={kind: linear} would work",
                ("embedder.kind",),
            )
