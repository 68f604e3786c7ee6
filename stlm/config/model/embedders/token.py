"""Config of the token embedder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from stlm.config.model.embedders.base import EmbedderConfig, scaled_setting
from stlm.config.model.embedders.ngrams import NgramsConfig
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, register, setting


@register("token")
@dataclass(frozen=True)
class TokenEmbedderConfig(EmbedderConfig):
    """One learned vector per id of any tokenizer."""

    rank: int | None = setting(
        None,
        "width of the table, which a second matrix maps to model.width; null: one table of model.width",
        unit="dimensions",
        minimum=1,
    )
    scaled: bool = scaled_setting()
    ngrams: NgramsConfig = field(default=NgramsConfig(), metadata={"help": "hash n-grams of ids"})

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        yield from self.ngrams.check(model, "embedder.ngrams")
        if self.rank is not None and self.rank >= model.width:
            yield Conflict(
                "embedder.rank",
                f"got {self.rank}, expected less than model.width = {model.width}, or null for a table that is not "
                f"factorised; {max(1, model.width // 4)} would work",
                ("width",),
            )
