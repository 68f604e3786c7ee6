"""Config of the transformer core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from stlm.config.model.core.attention import AttentionConfig, GroupedQueryConfig
from stlm.config.model.core.base import CoreConfig
from stlm.config.model.core.blocks import LoopsConfig, ResidualConfig
from stlm.config.model.core.feed_forward import FeedForwardConfig, SwiGLUConfig
from stlm.config.model.core.normalization import NormConfig, RMSNormConfig
from stlm.config.model.core.positions import PositionsConfig, RoPEConfig
from stlm.config.model.core.sharing import SharingConfig
from stlm.config.model.exits import ExitsConfig
from stlm.config.model.shape import ModelShape
from stlm.config.yaml.fields import Conflict, register, setting


@register("transformer")
@dataclass(frozen=True)
class TransformerCoreConfig(CoreConfig):
    """Pre-norm transformer. The defaults are Llama's recipe: RMSNorm, rotary positions, SwiGLU."""

    num_layers: int = setting(6, "number of layers", unit="layers", minimum=1)
    attention: AttentionConfig = field(default=GroupedQueryConfig(), metadata={"help": "between positions"})
    feed_forward: FeedForwardConfig = field(default=SwiGLUConfig(), metadata={"help": "within each position"})
    norm: NormConfig = field(
        default=RMSNormConfig(), metadata={"help": "before attention and feed-forward, and after the last layer"}
    )
    positions: PositionsConfig = field(default=RoPEConfig(), metadata={"help": "positional encoding"})
    residual: ResidualConfig = field(default=ResidualConfig(), metadata={"help": "addition of branch outputs"})
    sharing: SharingConfig = field(default=SharingConfig(), metadata={"help": "weights that layers share"})
    loops: LoopsConfig = field(default=LoopsConfig(), metadata={"help": "layers that are run several times"})
    exits: ExitsConfig = field(
        default=ExitsConfig(), metadata={"help": "additional layers that the head can read from"}
    )
    layer_dropout: float = setting(
        0.0,
        "fraction of rows that skip the last layer in training; less in earlier layers, 0 in the first "
        "(LayerSkip, arXiv 2404.16710)",
        minimum=0.0,
        below=1.0,
    )

    def modules(self) -> tuple[str, ...]:
        """Return the places of a block's matrices and norms, such as attention.query, which layers may share."""
        return (
            "attention_norm",
            *(f"attention.{name}" for name in self.attention.modules()),
            "feed_forward_norm",
            *(f"feed_forward.{name}" for name in self.feed_forward.modules()),
        )

    @property
    def depth(self) -> int:
        """Number of layers that are run; a layer run twice counts twice."""
        return len(self.loops.order(self.num_layers))

    def check(self, model: ModelShape) -> Iterator[Conflict]:
        for part in (self.attention, self.feed_forward, self.norm, self.positions):
            yield from part.check(model)
        yield from self.attention.fit(model, even=self.positions.rotates_pairs)
        if getattr(self.attention, "value_residual", False) and self.num_layers == 1:
            yield Conflict(
                "core.attention.value_residual",
                "got true in a core of one layer, which has no later layer; expected false, or model.core.num_layers=2",
                ("core.num_layers",),
            )
        yield from self.positions.fit(self.attention, model)
        for conflict in self.sharing.check(self.num_layers, self.modules()):
            yield conflict.under("core.sharing")
        for conflict in self.loops.check(self.num_layers):
            yield conflict.under("core.loops")
        for conflict in self.exits.check(self.depth):
            yield conflict.under("core.exits")
        if self.layer_dropout and self.depth == 1:
            yield Conflict(
                "core.layer_dropout",
                f"got {self.layer_dropout:g}, which has no effect on a single layer, as the first is never skipped; "
                "0 would work",
                ("core.num_layers", "core.loops"),
            )
