"""Config of the embedder of byte patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from stlm.config.model.embedders.base import EmbedderConfig
from stlm.config.model.embedders.ngrams import ByteNgramsConfig
from stlm.config.model.embedders.patching.rules import FixedPatchingConfig, PatchingConfig
from stlm.config.model.shape import ModelShape, heads_fit
from stlm.config.yaml.fields import Conflict, register, setting


@register("byte_patch")
@dataclass(frozen=True)
class BytePatchEmbedderConfig(EmbedderConfig):
    """A small local transformer over bytes, gathered into one vector per patch."""

    patched: ClassVar[bool] = True
    byte_ids: ClassVar[bool] = True

    patching: PatchingConfig = field(default=FixedPatchingConfig(), metadata={"help": "where patches begin"})
    width: int = setting(
        128, "width of the local layers, in the embedder and in the byte_patch head", unit="dimensions", minimum=2
    )
    num_layers: int = setting(1, "local layers, which run before patches are formed", unit="layers", minimum=0)
    num_heads: int = setting(2, "attention heads of a local layer", unit="heads", minimum=1, needs=("num_layers", 1))
    window: int = setting(
        32,
        "bytes that local attention reaches back over, the current one included",
        unit="bytes",
        minimum=1,
        needs=("num_layers", 1),
    )
    ngrams: ByteNgramsConfig = field(default=ByteNgramsConfig(), metadata={"help": "hash n-grams of bytes"})

    def positions_of(self, length: int) -> int:
        return self.patching.num_slots(length)

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        yield from heads_fit("embedder.num_heads", self.num_heads, "embedder.width", self.width)
        yield from self.patching.check(model)
        yield from self.ngrams.check(model, "embedder.ngrams")
