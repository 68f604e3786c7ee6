"""Configs of position information in a transformer, chosen by `kind`. Each has a module of that kind in stlm.model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from stlm.config.model.core.attention import AttentionConfig
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Component, Conflict, register, setting


@dataclass(frozen=True)
class PositionsConfig(Component):
    """Family of positions. `rotates_pairs`: they rotate pairs of elements, so heads need an even width."""

    rotates_pairs: ClassVar[bool] = False

    def fit(self, attention: AttentionConfig, model: ModelShape) -> Iterator[Conflict]:
        """Yield the conflicts with the attention, keys relative to the ModelConfig."""
        yield from ()


@register("rope")
@dataclass(frozen=True)
class RoPEConfig(PositionsConfig):
    """Rotary positions: queries and keys are rotated by angles proportional to the position."""

    rotates_pairs: ClassVar[bool] = True

    theta: float = setting(10000.0, "base of the wavelengths, in positions", minimum=1.0)
    fraction: float = setting(
        1.0, "fraction of each head that is rotated, from its first element", above=0.0, maximum=1.0
    )

    def rotary_width_of(self, head_width: int) -> int:
        """Return how many numbers of a head are rotated; must be even, as they are rotated in pairs."""
        return round(head_width * self.fraction)

    def fit(self, attention: AttentionConfig, model: ModelShape) -> Iterator[Conflict]:
        head_width = attention.head_width_of(model.width)
        rotated = self.rotary_width_of(head_width)
        if head_width % 2 == 0 and (rotated % 2 or not rotated):
            yield Conflict(
                "core.positions.fraction",
                f"got {self.fraction:g}, which rotates {rotated} elements of a head of {head_width}, expected an even "
                f"number, as they are rotated in pairs; {max(2, rotated - 1) / head_width:g} would work",
                ("core.attention.num_heads", "core.attention.head_width", "width"),
            )


@register("learned")
@dataclass(frozen=True)
class LearnedPositionsConfig(PositionsConfig):
    """A learned vector for each position of the context, added before the first layer."""


@register("none")
@dataclass(frozen=True)
class NoPositionsConfig(PositionsConfig):
    """No positions: order is known from the causal mask alone."""


@register("alibi")
@dataclass(frozen=True)
class ALiBiConfig(PositionsConfig):
    """Attention scores decrease linearly with distance, at a rate of each head's own."""
