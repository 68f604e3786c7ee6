"""Configs of attention in a transformer layer, chosen by `kind`. Each has a module of the same kind in stlm.model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.model.shape import ModelShape, divisors, heads_fit, nearest
from stlm.config.yaml.fields import Component, Conflict, register, setting


@dataclass(frozen=True)
class AttentionConfig(Component):
    """Family of attentions. All of them have heads."""

    num_heads: int = setting(4, "query heads", unit="heads", minimum=1)

    def head_width_of(self, width: int) -> int:
        """Return the width of one head, for vectors of `width`."""
        return width // self.num_heads

    def fit(self, model: ModelShape, even: bool) -> Iterator[Conflict]:
        """Yield the conflicts with the width, keys relative to the ModelConfig. `even`: heads need an even width."""
        yield from heads_fit("core.attention.num_heads", self.num_heads, "width", model.width, even)

    def modules(self) -> tuple[str, ...]:
        """Return the names of its matrices and norms, which layers may share."""
        raise TypeError(f"{type(self).__name__} defines no modules()")


@register("grouped_query")
@dataclass(frozen=True)
class GroupedQueryConfig(AttentionConfig):
    """Causal attention in which groups of query heads share keys and values."""

    num_kv_heads: int | None = setting(
        None,
        "key and value heads; null: as many as num_heads (multi-head attention), 1: multi-query",
        unit="heads",
        minimum=1,
    )
    head_width: int | None = setting(None, "width of a head; null: width / num_heads", unit="dimensions", minimum=1)
    bias: str = setting(
        "none",
        "matrices with a bias: none, qkv (query, key and value) or all (output too)",
        choices=("none", "qkv", "all"),
    )
    qk_norm: bool = setting(False, "normalize the queries and keys of each head")
    window: int | None = setting(
        None,
        "positions that attention reaches back over, the current one included; null: all",
        unit="positions",
        minimum=1,
    )
    full_every: int | None = setting(
        None,
        "layers whose number, counted from 1, is a multiple of this attend to all positions (window only); null: none",
        unit="layers",
        minimum=1,
    )
    logit_cap: float | None = setting(
        None,
        "bound on attention scores: cap * tanh(score / cap); slower; null: none",
        above=0.0,
    )
    value_residual: bool = setting(False, "later layers mix the first layer's values with their own")

    def head_width_of(self, width: int) -> int:
        return self.head_width or super().head_width_of(width)

    def window_of(self, layer: int) -> int | None:
        """Return the window of layer number `layer`, counted from 0; None: all positions."""
        full = self.full_every is not None and (layer + 1) % self.full_every == 0
        return None if full else self.window

    def fit(self, model: ModelShape, even: bool) -> Iterator[Conflict]:
        if self.head_width is None:
            yield from super().fit(model, even)
        elif even and self.head_width % 2:
            yield Conflict(
                "core.attention.head_width",
                f"got {self.head_width}, expected an even number (rotary positions rotate pairs); "
                f"{self.head_width + 1} would work",
                ("core.positions.kind",),
            )

    def modules(self) -> tuple[str, ...]:
        norms = ("query_norm", "key_norm") if self.qk_norm else ()
        return ("query", "key", "value", "output", *norms)

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            fitting = nearest(self.num_kv_heads, divisors(self.num_heads))
            yield Conflict(
                "core.attention.num_kv_heads",
                f"got {self.num_kv_heads}, expected a divisor of model.core.attention.num_heads = {self.num_heads}; "
                f"{fitting} would work",
                ("core.attention.num_heads",),
            )
        positions = model.embedder.positions_of(model.context_length)
        if self.window is not None and self.window >= positions:
            yield Conflict(
                "core.attention.window",
                f"got {self.window}, which has no effect on the {positions} positions of model.context_length = "
                f"{model.context_length}; expected less, or null; {max(1, positions // 4)} would work",
                ("context_length",),
                idle=True,
            )
        if self.full_every is not None and self.window is None:
            yield Conflict(
                "core.attention.full_every",
                f"got {self.full_every}, which has no effect without a window; expected null, or "
                f"model.core.attention.window={max(1, model.context_length // 4)}",
                ("core.attention.window",),
            )
        elif self.full_every == 1:
            yield Conflict(
                "core.attention.full_every",
                "got 1, which leaves no layer with a window; expected 2 or more, or model.core.attention.window=null",
                ("core.attention.window",),
            )
