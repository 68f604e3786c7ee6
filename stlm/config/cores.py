"""Cores, chosen by `kind`: vectors in, vectors out. Each has a registered module of the same kind in stlm.model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stlm.config.fields import Component, Conflict, register, setting
from stlm.config.fitting import divisors, heads_fit, nearest

if TYPE_CHECKING:
    from stlm.config.schema import ModelConfig


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
        yield from heads_fit("core.num_heads", self.num_heads, "width", model.width)
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            fitting = nearest(self.num_kv_heads, divisors(self.num_heads))
            yield Conflict(
                "core.num_kv_heads",
                f"got {self.num_kv_heads}, expected a divisor of model.core.num_heads = {self.num_heads}; "
                f"{fitting} would work",
                ("core.num_heads",),
            )
