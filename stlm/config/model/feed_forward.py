"""Configs of the feed-forward in a transformer, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Component, Conflict, register, setting


def gated_width(width: int, share: int = 1) -> int:
    """Return 8/3 of width / `share`, rounded up to a multiple of 32. Three such matrices cost as much as two of 4x."""
    return -(-8 * width // (3 * 32 * share)) * 32


@dataclass(frozen=True)
class FeedForwardConfig(Component):
    """Family of feed-forwards."""

    def modules(self) -> tuple[str, ...]:
        """Return the names of its matrices, which layers may share."""
        raise TypeError(f"{type(self).__name__} defines no modules()")


@register("swiglu")
@dataclass(frozen=True)
class SwiGLUConfig(FeedForwardConfig):
    """Gated feed-forward: two input matrices, one of which gates the other through silu, and an output matrix."""

    hidden_width: int | None = setting(
        None, "width inside; null: 8/3 of the width, rounded up to a multiple of 32", minimum=1
    )
    bias: bool = setting(False, "the matrices have a bias")

    def hidden_width_of(self, width: int) -> int:
        """Return the hidden width, for vectors of `width`."""
        return self.hidden_width or gated_width(width)

    def modules(self) -> tuple[str, ...]:
        return ("gate", "up", "down")


@dataclass(frozen=True)
class PlainFeedForwardConfig(FeedForwardConfig):
    """Settings shared by feed-forwards of one input and one output matrix."""

    hidden_width: int | None = setting(None, "width inside; null: 4 times the width", minimum=1)
    bias: bool = setting(False, "the matrices have a bias")

    def hidden_width_of(self, width: int) -> int:
        """Return the hidden width, for vectors of `width`."""
        return self.hidden_width or 4 * width

    def modules(self) -> tuple[str, ...]:
        return ("up", "down")


@register("gelu")
@dataclass(frozen=True)
class GELUConfig(PlainFeedForwardConfig):
    """Input matrix, gelu, output matrix."""

    approximate: bool = setting(False, "gelu by way of tanh, as GPT-2 has it, rather than exact")


@register("relu_squared")
@dataclass(frozen=True)
class ReLUSquaredConfig(PlainFeedForwardConfig):
    """Input matrix, squared relu, output matrix."""


@register("moe")
@dataclass(frozen=True)
class MoEConfig(FeedForwardConfig):
    """Mixture of experts: each position passes through a few SwiGLUs, chosen by a router."""

    num_experts: int = setting(8, "experts of a layer", minimum=2)
    experts_per_token: int = setting(2, "experts that each position goes through", minimum=1)
    hidden_width: int | None = setting(
        None,
        "width inside an expert; null: 8/3 of the width / experts_per_token, rounded up to a multiple of 32",
        minimum=1,
    )
    shared_hidden_width: int | None = setting(
        None, "width inside one more SwiGLU that all positions go through; null: there is none", minimum=1
    )
    balance_weight: float = setting(
        0.01, "weight of the loss that is 1 where the experts of a row are used alike, and more where not", minimum=0.0
    )

    def hidden_width_of(self, width: int) -> int:
        """Return the hidden width of an expert, for vectors of `width`."""
        return self.hidden_width or gated_width(width, self.experts_per_token)

    def modules(self) -> tuple[str, ...]:
        shared = ("shared.gate", "shared.up", "shared.down") if self.shared_hidden_width else ()
        return ("router", "gate", "up", "down", *shared)

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        if self.experts_per_token > self.num_experts:
            yield Conflict(
                "core.feed_forward.experts_per_token",
                f"got {self.experts_per_token}, expected at most model.core.feed_forward.num_experts = "
                f"{self.num_experts}; {min(2, self.num_experts)} would work",
                ("core.feed_forward.num_experts",),
            )
