"""Config of the published byte model's embedder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.embedders.base import EmbedderConfig
from stlm.config.model.shape import ModelShape, heads_fit
from stlm.config.yaml.fields import Conflict, register, setting


@register("paper")
@dataclass(frozen=True)
class PublishedEmbedderConfig(EmbedderConfig):
    """Ids of any tokenizer, each read as bytes by a small bidirectional transformer, whose outputs are averaged."""

    slots: int = setting(
        16,
        "byte slots of an id, in the embedder and in the paper head; no id may have more bytes",
        unit="bytes",
        minimum=1,
    )
    width: int = setting(
        128, "width of the layers over bytes, in the embedder and in the paper head", unit="dimensions", minimum=2
    )
    num_layers: int = setting(2, "layers over the bytes of an id", unit="layers", minimum=0)
    num_heads: int = setting(
        4, "attention heads of a layer over bytes", unit="heads", minimum=1, needs=("num_layers", 1)
    )
    reconstruction_weight: float = setting(
        0.0, "weight of the paper head's loss in spelling each id read, from its vector; 0: none", minimum=0.0
    )

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        yield from heads_fit("embedder.num_heads", self.num_heads, "embedder.width", self.width)
        if self.reconstruction_weight and model.head.kind != "paper":
            yield Conflict(
                "embedder.reconstruction_weight",
                f"got {self.reconstruction_weight:g}, which has no effect with the head {model.head.kind!r}; "
                "expected 0, or model.head={kind: paper}",
                ("head.kind",),
            )
