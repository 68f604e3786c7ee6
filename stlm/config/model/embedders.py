"""Configs of embedders (ids to vectors), chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stlm.config.model.fitting import heads_fit
from stlm.config.model.ngrams import ByteNgramsConfig, NgramsConfig
from stlm.config.model.patching import FixedPatchingConfig, PatchingConfig
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Component, Conflict, register, setting


@dataclass(frozen=True)
class EmbedderConfig(Component):
    """Family of embedders. `patched`: one vector stands for several ids. `byte_ids`: ids are bytes."""

    patched: ClassVar[bool] = False
    byte_ids: ClassVar[bool] = False

    def positions_of(self, length: int) -> int:
        """Return the largest number of vectors that the core gets for `length` ids."""
        return length


def scaled_setting() -> Any:
    """Return the field `scaled`, which embedders share."""
    return setting(True, "vectors are read times sqrt(width); off for models that were made without it, as GPT-2 was")


@register("token")
@dataclass(frozen=True)
class TokenEmbedderConfig(EmbedderConfig):
    """One learned vector per id of any tokenizer."""

    rank: int | None = setting(
        None, "width of the table's vectors, which a second matrix takes to model.width; null: one table", minimum=1
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


@register("byte")
@dataclass(frozen=True)
class ByteEmbedderConfig(EmbedderConfig):
    """One learned vector per byte."""

    byte_ids: ClassVar[bool] = True

    scaled: bool = scaled_setting()
    ngrams: ByteNgramsConfig = field(default=ByteNgramsConfig(), metadata={"help": "hash n-grams of bytes"})

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        yield from self.ngrams.check(model, "embedder.ngrams")


@register("byte_patch")
@dataclass(frozen=True)
class BytePatchEmbedderConfig(EmbedderConfig):
    """A small local transformer over bytes, gathered into one vector per patch."""

    patched: ClassVar[bool] = True
    byte_ids: ClassVar[bool] = True

    patching: PatchingConfig = field(default=FixedPatchingConfig(), metadata={"help": "where patches begin"})
    width: int = setting(128, "width of the local layers, in the embedder and in the byte_patch head", minimum=2)
    num_layers: int = setting(1, "local layers before patches are formed", minimum=0)
    num_heads: int = setting(2, "attention heads of a local layer", minimum=1, needs=("num_layers", 1))
    window: int = setting(32, "bytes that local attention sees, its own included", minimum=1, needs=("num_layers", 1))
    ngrams: ByteNgramsConfig = field(default=ByteNgramsConfig(), metadata={"help": "hash n-grams of bytes"})

    def positions_of(self, length: int) -> int:
        return self.patching.num_slots(length)

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        yield from heads_fit("embedder.num_heads", self.num_heads, "embedder.width", self.width)
        yield from self.patching.check(model)
        yield from self.ngrams.check(model, "embedder.ngrams")


@register("paper")
@dataclass(frozen=True)
class PaperEmbedderConfig(EmbedderConfig):
    """Ids of any tokenizer, each read as bytes by a small bidirectional transformer, whose outputs are averaged."""

    slots: int = setting(16, "bytes by which an id is read, and spelt by the paper head", minimum=1)
    width: int = setting(128, "width of the layers over bytes, in the embedder and in the paper head", minimum=2)
    num_layers: int = setting(2, "layers over the bytes of an id", minimum=0)
    num_heads: int = setting(4, "attention heads of such a layer", minimum=1, needs=("num_layers", 1))
    reconstruction_weight: float = setting(
        0.0, "weight of the paper head's nats in spelling the id just read from its vector; 0: not asked", minimum=0.0
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
