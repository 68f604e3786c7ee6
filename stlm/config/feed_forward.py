"""Feed-forward of a transformer layer, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.fields import Component, register, setting


@dataclass(frozen=True)
class FeedForwardConfig(Component):
    """Family of feed-forwards."""

    def modules(self) -> tuple[str, ...]:
        """Names of its matrices: what layers may share."""
        raise TypeError(f"{type(self).__name__} defines no modules()")


@register("swiglu")
@dataclass(frozen=True)
class SwiGLUConfig(FeedForwardConfig):
    """Gated by silu."""

    hidden_width: int | None = setting(
        None, "width inside; null: 8/3 of the width, rounded up to a multiple of 32", minimum=1
    )

    def modules(self) -> tuple[str, ...]:
        return ("gate", "up", "down")
