"""The parts a model is composed of: embedders, cores and heads, as frozen dataclasses chosen by `kind`.

A new component is one decorated dataclass here (and one registered module of the same kind in stlm.model).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from stlm.config.fields import Component, Conflict, register, setting

if TYPE_CHECKING:
    from stlm.config.schema import ModelConfig


# Embedders: ids in, vectors out.


@dataclass(frozen=True)
class EmbedderConfig(Component):
    """Family of embedders. `patched` says that one vector stands for several ids; `byte_ids` that ids are bytes."""

    patched: ClassVar[bool] = False
    byte_ids: ClassVar[bool] = False


@register("token")
@dataclass(frozen=True)
class TokenEmbedderConfig(EmbedderConfig):
    """One learned vector per id of any tokenizer."""


@register("byte")
@dataclass(frozen=True)
class ByteEmbedderConfig(EmbedderConfig):
    """One learned vector per byte."""

    byte_ids: ClassVar[bool] = True


@register("byte_patch")
@dataclass(frozen=True)
class BytePatchEmbedderConfig(EmbedderConfig):
    """A small local transformer over bytes, gathered into one vector per patch of fixed length."""

    patched: ClassVar[bool] = True
    byte_ids: ClassVar[bool] = True

    patch_size: int = setting(4, "bytes per patch", minimum=1)
    width: int = setting(128, "width of the local layers, in the embedder and in the byte_patch head", minimum=2)
    num_layers: int = setting(1, "local layers before patches are formed", minimum=0)
    num_heads: int = setting(2, "attention heads of a local layer", minimum=1)
    window: int = setting(32, "bytes that local attention sees, its own included", minimum=1)

    def check(self, model: ModelConfig) -> Iterator[Conflict]:
        yield from _heads_fit("embedder.num_heads", self.num_heads, "embedder.width", self.width)
        if model.context_length % self.patch_size:
            rounded = -(-model.context_length // self.patch_size) * self.patch_size
            yield Conflict(
                "context_length",
                f"got {model.context_length}, expected a multiple of model.embedder.patch_size = {self.patch_size}; "
                f"{rounded} would work",
                ("embedder.patch_size",),
            )


# Cores: vectors in, vectors out.


@dataclass(frozen=True)
class CoreConfig(Component):
    """Family of cores."""


@register("transformer")
@dataclass(frozen=True)
class TransformerCoreConfig(CoreConfig):
    """Pre-norm transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    num_layers: int = setting(6, "layers", minimum=1)
    num_heads: int = setting(4, "query heads of a layer", minimum=1)
    num_kv_heads: int | None = setting(None, "key and value heads of a layer; null: as many as num_heads", minimum=1)
    ffn_width: int | None = setting(
        None, "hidden width of the feed-forward; null: 8/3 of the width, rounded up to a multiple of 32", minimum=1
    )
    rope_theta: float = setting(10000.0, "base of the rotary wavelengths, in positions", minimum=1.0)

    def check(self, model: ModelConfig) -> Iterator[Conflict]:
        yield from _heads_fit("core.num_heads", self.num_heads, "width", model.width)
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            fitting = _nearest(self.num_kv_heads, _divisors(self.num_heads))
            yield Conflict(
                "core.num_kv_heads",
                f"got {self.num_kv_heads}, expected a divisor of model.core.num_heads = {self.num_heads}; "
                f"{fitting} would work",
                ("core.num_heads",),
            )


# Heads: vectors in, logits out.


@dataclass(frozen=True)
class HeadConfig(Component):
    """Family of heads."""

    tied: bool = setting(True, "use the embedder's vectors as the weights of the last matrix: one storage for both")


@register("linear")
@dataclass(frozen=True)
class LinearHeadConfig(HeadConfig):
    """One linear map from each vector to the logits of one id."""

    def check(self, model: ModelConfig) -> Iterator[Conflict]:
        if model.embedder.patched:
            yield Conflict(
                "head.kind",
                f"got {self.kind!r}, which predicts one id per vector, expected a head that predicts patches for the "
                f"embedder {model.embedder.kind!r}; model.head={{kind: byte_patch}} would work",
                ("embedder.kind",),
            )


@register("byte_patch")
@dataclass(frozen=True)
class BytePatchHeadConfig(HeadConfig):
    """A small local transformer that spells out each patch byte by byte; as wide as the embedder's local layers."""

    num_layers: int = setting(1, "local layers", minimum=1)
    num_heads: int = setting(2, "attention heads of a local layer", minimum=1)
    window: int = setting(32, "bytes that local attention sees, its own included", minimum=1)

    def check(self, model: ModelConfig) -> Iterator[Conflict]:
        embedder = model.embedder
        if isinstance(embedder, BytePatchEmbedderConfig):
            yield from _heads_fit("head.num_heads", self.num_heads, "embedder.width", embedder.width)
        else:
            yield Conflict(
                "head.kind",
                f"got {self.kind!r}, which needs patches, expected a head for the embedder {embedder.kind!r}; "
                "model.head={kind: linear} would work",
                ("embedder.kind",),
            )


# Arithmetic that several components share.


def _heads_fit(heads_key: str, num_heads: int, width_key: str, width: int) -> Iterator[Conflict]:
    """Heads share the width evenly, and rotary positions turn pairs: each head's width is even."""
    if width % num_heads == 0 and width // num_heads % 2 == 0:
        return
    if width % 2:
        yield Conflict(
            width_key, f"got {width}, expected an even number (rotary positions turn pairs); {width + 1} would work"
        )
        return
    fitting = _nearest(num_heads, _divisors(width // 2))
    yield Conflict(
        heads_key,
        f"got {num_heads}, expected a divisor of model.{width_key} = {width} that leaves each head an even width; "
        f"{fitting} would work",
        (width_key,),
    )


def _divisors(number: int) -> list[int]:
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return [*small, *(number // candidate for candidate in small)]


def _nearest(target: int, candidates: list[int]) -> int:
    return min(candidates, key=lambda candidate: (abs(candidate - target), candidate))
