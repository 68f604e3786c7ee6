"""Config of the linear head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.embedders.published import PublishedEmbedderConfig
from stlm.config.model.heads.base import HeadConfig, logit_cap_setting
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, register


@register("linear")
@dataclass(frozen=True)
class LinearHeadConfig(HeadConfig):
    """One linear map from each vector to the logits of one id."""

    logit_cap: float | None = logit_cap_setting()

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        if model.embedder.patched:
            yield Conflict(
                "head.kind",
                f"got {self.kind!r}, which predicts one id per vector, expected a head that predicts patches for the "
                f"embedder {model.embedder.kind!r}; model.head={{kind: byte_patch}} would work",
                ("embedder.kind",),
            )
        elif self.tied and isinstance(model.embedder, PublishedEmbedderConfig):
            yield Conflict(
                "head.tied",
                "got true, but the embedder 'paper' has vectors for bytes only, expected false, or "
                "model.head={kind: paper}",
                ("embedder.kind",),
            )
