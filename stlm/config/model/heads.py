"""Configs of heads (vectors to logits), chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stlm.config.model.embedders import BytePatchEmbedderConfig, PaperEmbedderConfig
from stlm.config.model.fitting import heads_fit
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Component, Conflict, register, setting


@dataclass(frozen=True)
class HeadConfig(Component):
    """Family of heads."""

    tied: bool = setting(True, "use the embedder's vectors as the weights of the last matrix: one storage for both")


def logit_cap_setting() -> Any:
    """Return the field `logit_cap`, which heads share."""
    help = "logits stay within ± this, by cap * tanh(logit / cap) (Gemma 2, arXiv 2408.00118); null: no bounds"
    return setting(None, help, above=0.0)


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
        elif self.tied and isinstance(model.embedder, PaperEmbedderConfig):
            yield Conflict(
                "head.tied",
                "got true, but the embedder 'paper' has vectors of bytes alone, expected false; or "
                "model.head={kind: paper}, which spells ids in bytes",
                ("embedder.kind",),
            )


@register("byte_patch")
@dataclass(frozen=True)
class BytePatchHeadConfig(HeadConfig):
    """A small local transformer that decodes each patch byte by byte, with the width of the embedder's local layers."""

    num_layers: int = setting(1, "local layers", minimum=1)
    num_heads: int = setting(2, "attention heads of a local layer", minimum=1)
    window: int = setting(32, "bytes that local attention sees, its own included", minimum=1)
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


@register("paper")
@dataclass(frozen=True)
class PaperHeadConfig(HeadConfig):
    """Prediction of all bytes of the next id at once, by a small bidirectional transformer as in the embedder."""

    num_layers: int = setting(2, "layers over the bytes of an id", minimum=0)
    num_heads: int = setting(4, "attention heads of such a layer", minimum=1, needs=("num_layers", 1))

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        embedder = model.embedder
        if isinstance(embedder, PaperEmbedderConfig):
            yield from heads_fit("head.num_heads", self.num_heads, "embedder.width", embedder.width)
        else:
            head = "byte_patch" if embedder.patched else "linear"
            yield Conflict(
                "head.kind",
                f"got {self.kind!r}, which spells what the embedder 'paper' reads, expected a head for the embedder "
                f"{embedder.kind!r}; model.head={{kind: {head}}} would work",
                ("embedder.kind",),
            )
