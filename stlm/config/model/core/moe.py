"""Config of the mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.core.feed_forward import FeedForwardConfig, gated_width
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, register, setting


@register("moe")
@dataclass(frozen=True)
class MoEConfig(FeedForwardConfig):
    """Mixture of experts: each position passes through a few SwiGLUs, chosen by a router."""

    num_experts: int = setting(8, "experts in a layer", unit="experts", minimum=2)
    experts_per_token: int = setting(2, "experts that process each position", unit="experts", minimum=1)
    hidden_width: int | None = setting(
        None,
        "hidden width of an expert; null: 8/3 of the width / experts_per_token, rounded up to a multiple of 32",
        unit="dimensions",
        minimum=1,
    )
    shared_hidden_width: int | None = setting(
        None,
        "hidden width of an additional SwiGLU that processes all positions; null: none",
        unit="dimensions",
        minimum=1,
    )
    balance_weight: float = setting(
        0.01,
        "weight of the load-balancing loss, which is 1 if the experts of a row are used equally and higher otherwise",
        minimum=0.0,
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
