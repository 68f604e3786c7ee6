"""Attention of a transformer layer, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stlm.config.fields import Component, Conflict, register, setting
from stlm.config.fitting import divisors, heads_fit, nearest

if TYPE_CHECKING:
    from stlm.config.schema import ModelConfig


@dataclass(frozen=True)
class AttentionConfig(Component):
    """Family of attentions."""

    def head_width_of(self, width: int) -> int:
        """Width of one head where the layer's vectors have `width`."""
        raise TypeError(f"{type(self).__name__} defines no head_width_of()")

    def modules(self) -> tuple[str, ...]:
        """Names of its matrices and norms: what layers may share."""
        raise TypeError(f"{type(self).__name__} defines no modules()")


@register("grouped_query")
@dataclass(frozen=True)
class GroupedQueryConfig(AttentionConfig):
    """Causal attention in which groups of query heads share keys and values."""

    num_heads: int = setting(4, "query heads", minimum=1)
    num_kv_heads: int | None = setting(
        None, "key and value heads; null: as many as num_heads (multi-head attention), 1: multi-query", minimum=1
    )
    window: int | None = setting(None, "positions that are seen, the own included; null: all before it", minimum=1)

    def head_width_of(self, width: int) -> int:
        return width // self.num_heads

    def modules(self) -> tuple[str, ...]:
        return ("query", "key", "value", "output")

    def check(self, model: ModelConfig) -> Iterator[Conflict]:
        yield from heads_fit("core.attention.num_heads", self.num_heads, "width", model.width)
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            fitting = nearest(self.num_kv_heads, divisors(self.num_heads))
            yield Conflict(
                "core.attention.num_kv_heads",
                f"got {self.num_kv_heads}, expected a divisor of model.core.attention.num_heads = {self.num_heads}; "
                f"{fitting} would work",
                ("core.attention.num_heads",),
            )
