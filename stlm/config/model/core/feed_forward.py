"""Configs of the feed-forward in a transformer, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from dataclasses import dataclass

from stlm.config.yaml.fields import Component, register, setting


def gated_width(width: int, share: int = 1) -> int:
    """Return 8/3 of width / `share`, rounded up to a multiple of 32. Three such matrices cost as much as two of 4x."""
    return -(-8 * width // (3 * 32 * share)) * 32


@dataclass(frozen=True)
class FeedForwardConfig(Component):
    """Base of the settings of all feed-forwards."""

    def modules(self) -> tuple[str, ...]:
        """Return the names of its matrices, which layers may share."""
        raise TypeError(f"{type(self).__name__} defines no modules()")


@register("swiglu")
@dataclass(frozen=True)
class SwiGLUConfig(FeedForwardConfig):
    """Gated feed-forward: two input matrices, one of which gates the other through silu, and an output matrix."""

    hidden_width: int | None = setting(
        None, "hidden width; null: 8/3 of the width, rounded up to a multiple of 32", unit="dimensions", minimum=1
    )
    bias: bool = setting(False, "add a bias to each matrix")

    def hidden_width_of(self, width: int) -> int:
        """Return the hidden width, for vectors of `width`."""
        return self.hidden_width or gated_width(width)

    def modules(self) -> tuple[str, ...]:
        return ("gate", "up", "down")


@dataclass(frozen=True)
class PlainFeedForwardConfig(FeedForwardConfig):
    """Settings shared by feed-forwards of one input and one output matrix."""

    hidden_width: int | None = setting(None, "hidden width; null: 4 times the width", unit="dimensions", minimum=1)
    bias: bool = setting(False, "add a bias to each matrix")

    def hidden_width_of(self, width: int) -> int:
        """Return the hidden width, for vectors of `width`."""
        return self.hidden_width or 4 * width

    def modules(self) -> tuple[str, ...]:
        return ("up", "down")


@register("gelu")
@dataclass(frozen=True)
class GELUConfig(PlainFeedForwardConfig):
    """Input matrix, gelu, output matrix."""

    approximate: bool = setting(False, "approximate GELU with tanh, as GPT-2 does")


@register("relu_squared")
@dataclass(frozen=True)
class ReLUSquaredConfig(PlainFeedForwardConfig):
    """Input matrix, squared relu, output matrix."""
