"""Heads, which map the core's vectors to logits of the next id at every position."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stlm.config import BytePatchEmbedderConfig, LinearHeadConfig, ModelConfig, TokenEmbedderConfig
from stlm.errors import ConfigError
from stlm.model.context import Context
from stlm.model.core.capping import soft_cap
from stlm.model.decoding.packed_weights import Packable, Products
from stlm.model.embedders.patching.rules import Patches
from stlm.model.embedders.token import Embedder, TokenEmbedder
from stlm.model.registry import Registry
from stlm.model.vocabulary import Vocabulary


class Head(Packable):
    """Interface of every head. `output` is the last matrix, [V, d]; if tied, it is the embedder's table."""

    output: nn.Linear
    logit_scale = 1.0  # of all logits, see width_transfer.py
    logit_cap: float | None = None

    def pack(self, products: Products) -> None:
        self.packed = products.of(self.output)

    def predict(self, x: Tensor) -> Tensor:
        """Apply `output`, the logit scale and the cap to the last vectors: [..., d] → logits [..., V]."""
        logits = self.output(x) if self.packed is None else self.packed(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return soft_cap(logits if self.logit_scale == 1.0 else logits * self.logit_scale, self.logit_cap)

    def new_cache(self) -> Any:
        """Return an empty decoding state for `forward(…, cache)`; None if the head keeps none."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forward(
        self,
        x_BPD: Tensor,
        inputs_BT: Tensor,
        patches: Patches | None,
        context: Context,
        cache: Any = None,
    ) -> Tensor:
        """Return logits [B, T, V]; with `context.wanted`, only those where it is True: [number of them, V]."""
        raise TypeError(f"{type(self).__name__} defines no forward()")


HEADS: Registry[Head] = Registry("head")


def tie(head: Head, embedder: Embedder) -> None:
    """Make the head's matrix and the embedder's table one tensor: one storage, one gradient, one saved copy.

    If the table is factorised, the second matrices of both are tied as well.
    """
    assert head.output.weight.shape == embedder.table.weight.shape
    head.output.weight = embedder.table.weight
    if isinstance(head, LinearHead) and head.factor is not None:
        assert isinstance(embedder, TokenEmbedder) and embedder.factor is not None
        head.factor.weight = embedder.factor.weight


class TransposedLinear(nn.Linear):
    """Linear map x W where `nn.Linear` computes x W^T: [B, T, out] → [B, T, in], so that a matrix can be tied."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@HEADS.register("linear")
class LinearHead(Head):
    """Linear head: logits = x W^T at every position, [B, T, D] → [B, T, V].

    If the embedder's table is factorised into V x r and r x D, so is W (ALBERT, arXiv 1909.11942, section 3.1).
    """

    def __init__(self, config: LinearHeadConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if isinstance(model.embedder, BytePatchEmbedderConfig):
            raise ConfigError("model.head.kind: got 'linear' with a byte_patch embedder, expected 'byte_patch'")
        rank = model.embedder.rank if isinstance(model.embedder, TokenEmbedderConfig) else None
        self.factor = TransposedLinear(rank, model.width, bias=False) if rank else None
        self.output = nn.Linear(rank or model.width, vocabulary.size, bias=False)
        self.logit_cap = config.logit_cap

    def new_cache(self) -> None:
        return None

    def forward(
        self,
        x_BPD: Tensor,
        inputs_BT: Tensor,
        patches: Patches | None,
        context: Context,
        cache: None = None,
    ) -> Tensor:
        x = context.pick(x_BPD)
        return self.predict(x if self.factor is None else self.factor(x))
