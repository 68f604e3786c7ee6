"""Config of the byte embedder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from stlm.config.model.embedders.base import EmbedderConfig, scaled_setting
from stlm.config.model.embedders.ngrams import ByteNgramsConfig
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, register


@register("byte")
@dataclass(frozen=True)
class ByteEmbedderConfig(EmbedderConfig):
    """One learned vector per byte."""

    byte_ids: ClassVar[bool] = True

    scaled: bool = scaled_setting()
    ngrams: ByteNgramsConfig = field(default=ByteNgramsConfig(), metadata={"help": "hash n-grams of bytes"})

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        yield from self.ngrams.check(model, "embedder.ngrams")
