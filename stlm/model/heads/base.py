"""The interface of heads, which map the core's vectors to logits of the next id, and their registry."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stlm.model.context import Context
from stlm.model.core.normalization import soft_cap
from stlm.model.decoding.packed_weights import Packable, Products
from stlm.model.embedders.base import Embedder
from stlm.model.embedders.patching.rules import Patches
from stlm.model.registry import Registry


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

    def tie(self, embedder: Embedder) -> None:
        """Make `output` and the embedder's table one tensor: one storage, one gradient, one saved copy."""
        assert self.output.weight.shape == embedder.table.weight.shape
        self.output.weight = embedder.table.weight

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
